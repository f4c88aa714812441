"""The pass of a calibration: the model gives what it gave, and what it measures is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from modules import GRID
from modules import TinyDiT
from modules import dit_inputs
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.ops.candidate_errors import SUMS
from compiled_sparse.passes.probe import Probe
from compiled_sparse.passes.probe import ProbedSite

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TILE = (2, 3, 2)
NARROW = cs.STA(window_thw=(1, 1, 1), tile_thw=TILE)
WHOLE = cs.STA(window_thw=(9, 9, 9), tile_thw=TILE)
Found = list[tuple[Sequence[ProbedSite], list[Tensor]]]


def probed(
    model: nn.Module, *inputs: Any, candidates: tuple[Any, ...] = (NARROW, WHOLE), **settings: Any
) -> tuple[Any, Found]:
    """Run a model once with a probe; its output and what was received."""
    found: Found = []

    def receive(sites: Sequence[ProbedSite], sums: Sequence[Tensor]) -> None:
        found.append((sites, [each.clone() for each in sums]))

    probe = Probe(candidates=candidates, receive=receive, rows=1000)
    options = {"policy": candidates[0], "probe": probe, "inner": "eager", **settings}
    compiled = torch.compile(model, backend="compiled_sparse", options=options, fullgraph=True)
    with torch.no_grad():
        return compiled(*inputs), found


def sums_of(sums: Tensor, name: str) -> Tensor:
    return sums[..., SUMS.index(name)]


def dit(**settings: Any) -> nn.Module:
    return TinyDiT(2, **settings).requires_grad_(False).eval()


def test_the_output_is_the_models_own_to_the_last_bit() -> None:
    model, inputs = dit(), dit_inputs()
    output, found = probed(model, *inputs)
    assert torch.equal(output, model(*inputs))
    ((sites, sums),) = found
    assert [site.path for site in sites] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert [each.shape for each in sums] == [(2, 2, len(SUMS))] * 2
    assert {site.grid_thw for site in sites} == {GRID}
    assert {site.tiles for site in sites} == {(TILE, TILE)}


def test_errors_are_those_of_eager_attention_on_the_same_inputs() -> None:
    model, inputs = dit(), dit_inputs()
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                calls.append(args[:3])
            return func(*args, **(kwargs or {}))

    with Spy():
        model(*inputs)
    _, ((_, sums),) = probed(model, *inputs)
    video = [qkv for qkv in calls if qkv[0].shape[2] == qkv[1].shape[2] == 60]
    assert len(video) == len(sums) == 2
    for (q, k, v), found in zip(video, sums, strict=True):
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        narrow = cs.reference.attention(q, k, v, NARROW, grid_thw=GRID)
        expected = (narrow - dense).double().square().sum((0, 2, 3))
        torch.testing.assert_close(sums_of(found, "squared_error")[0], expected, rtol=1e-4, atol=0)
        assert float(sums_of(found, "squared_error")[1].max()) < 1e-9
        mass = sums_of(found, "captured_mass") / sums_of(found, "rows")
        torch.testing.assert_close(mass[1], torch.ones(2).double())
        assert float(mass[0].max()) < 0.5


def test_padded_queries_count_nowhere() -> None:
    class Padded(torch.nn.Module):
        def forward(self, x: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
            mask = keys[:, None, None, :] & queries[:, None, :, None]
            return torch.nn.functional.scaled_dot_product_attention(x.sin(), x, x, mask)

    x, keys = torch.randn(2, 2, 60, 8), torch.ones(2, 60, dtype=torch.bool)
    queries = torch.arange(60).expand(2, -1) < 40
    with cs.metadata(grid_thw=GRID):
        _, ((_, sums),) = probed(Padded(), x, keys, queries)
    # The whole window is dense attention, which leaves zeros at padded queries.
    assert float(sums_of(sums[0], "squared_error")[1].max()) < 1e-9
    assert sums_of(sums[0], "elements").unique().item() == 2 * 40 * 8


@pytest.mark.slow
def test_inductor_measures_the_same() -> None:
    model, inputs = dit(), dit_inputs()
    _, ((_, eager),) = probed(model, *inputs)
    torch._dynamo.reset()
    _, found = probed(model, *inputs, inner="inductor")
    for one, other in zip(eager, found[0][1], strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-9)
        # The whole window differs from dense attention by rounding alone, each time in its own way.
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-5)


def test_one_candidate_is_gone_before_the_next_is_computed() -> None:
    """The nodes stand in the order dense, sums of rows, then each candidate with its errors."""
    from compiled_sparse.passes.fx import clone_dynamo_graph
    from compiled_sparse.passes.probe import ProbePass

    orders: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        rewritten = clone_dynamo_graph(graph)
        candidates = (NARROW, WHOLE, cs.VSA(sparsity=0.5, tile_thw=TILE))
        ProbePass(Probe(candidates=candidates, receive=lambda *_: None))(rewritten)
        names = [str(node.target) for node in rewritten.graph.nodes]
        kept = ("compiled_sparse.", "scaled_dot")
        orders.append([name for name in names if any(part in name for part in kept)])
        return graph.forward

    torch.compile(TinyDiT(1).requires_grad_(False), backend=backend)(*dit_inputs())
    first = next(i for i, name in enumerate(orders[0]) if "sampled" in name)
    short = [name.removeprefix("compiled_sparse.").split(".")[0] for name in orders[0][first - 2 :]]
    assert "scaled_dot" in orders[0][first - 2]
    assert short[1:7] == [
        "sta",
        "sampled_log_sums",
        "candidate_errors",
        "sta",
        "candidate_errors",
        "vsa",
    ]


def test_another_layout_of_the_same_length_is_measured_anew() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    found: Found = []
    probe = Probe(
        candidates=(cs.STA(window_thw=(1, 1), tile_thw=(2, 2)),),
        receive=lambda sites, sums: found.append((sites, [each.clone() for each in sums])),
    )
    options = {"policy": probe.candidates[0], "probe": probe, "inner": "eager"}
    model = torch.compile(Plain(), backend="compiled_sparse", options=options)
    q = torch.randn(1, 2, 24, 8)
    for grid in ((4, 6), (2, 12)):
        with torch.no_grad(), cs.metadata(grid_thw=grid):
            model(q)
    assert [sites[0].grid_thw for sites, _ in found] == [(4, 6), (2, 12)]
    assert not torch.equal(found[0][1][0], found[1][1][0])


def test_a_call_that_a_candidate_does_not_fit_is_left_alone_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = dit(), dit_inputs()
    misfit = cs.STA(window_thw=(3, 3), tile_thw=(2, 2))
    output, found = probed(model, *inputs, candidates=(NARROW, misfit))
    assert not found
    assert torch.equal(output, model(*inputs))
    assert "axes_mismatch" in caplog.text


def test_a_modules_own_policy_does_not_change_what_is_measured() -> None:
    model, inputs = dit(), dit_inputs()
    _, ((_, expected),) = probed(model, *inputs)
    torch._dynamo.reset()
    cs.attach(model, cs.STA(window_thw=(1, 3, 1), tile_thw=TILE))
    _, ((sites, found),) = probed(model, *inputs)
    assert [site.densities for site in sites] == [(0.125, 1.0)] * 2
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-12)


def test_grids_of_a_dynamic_model_are_told_apart() -> None:
    model = TinyDiT(1).requires_grad_(False).eval()
    seen: list[tuple[int, ...]] = []
    probe = Probe(
        candidates=(NARROW,), receive=lambda sites, _: seen.extend(s.grid_thw for s in sites)
    )
    options = {"policy": NARROW, "probe": probe, "inner": "eager"}
    compiled = torch.compile(model, backend="compiled_sparse", options=options, dynamic=True)
    grids = [(3, 4, 5), (2, 5, 7), (4, 3, 5), (3, 4, 5)]  # two of them of the same length
    for grid in grids:
        with torch.no_grad():
            compiled(*dit_inputs(grid))
    assert seen == grids


def test_force_and_environment_do_not_change_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPILED_SPARSE_BACKEND", "dense")
    model, inputs = dit(), dit_inputs()
    with cs.force("dense"):
        _, found = probed(model, *inputs)
    assert len(found) == 1
