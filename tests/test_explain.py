"""`explain`: what is reported, at what cost, and what it leaves behind."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import expecttest
import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import POLICY
from modules import Attention
from modules import Tiny
from modules import TinyDiT
from modules import assert_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.errors import StrictRewriteError
from compiled_sparse.errors import UnknownMechanismError

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_the_report_of_a_small_model_reads_well() -> None:
    report = cs.explain(TinyDiT(), *dit_inputs(), policy=POLICY)
    expecttest.assert_expected_inline(
        str(report),
        """\
2 of 4 attention calls sparse, density 0.125, 2 cross_attention
site                          kind   heads  q/k length  grid   text  decision  mechanism                            density  gain  reason
blocks.{0-1}.attn1 (2 calls)  self   2      60/60       3x4x5  -     sparse    sta:window_thw=1x1x1,tile_thw=2x3x2  0.125    6.4x
blocks.{0-1}.attn2 (2 calls)  cross  2      60/7        -      -     dense     -                                    1.000    -     cross_attention (queries and keys differ in length)
cross_attention: Keys are other tokens than the queries (text, image). Nothing to do.""",  # noqa: E501 - a table
    )


def test_the_report_of_a_model_with_problems_says_what_to_do() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        x = raster(x)
        x = x + m.attn(x, is_causal=True)
        x = x + m.attn(torch.cat([x, text], 1))[:, : x.shape[1]]
        return m.attn(x.roll(1, 1))

    report = cs.explain(Tiny(body), video(), tokens(1, 7), policy=POLICY)
    expecttest.assert_expected_inline(
        str(report),
        """\
1 of 3 attention calls sparse, density 0.298, 1 causal, 1 layout_unknown
site  kind   heads  q/k length  grid   text  decision  mechanism                            density  gain  reason
attn  self   2      60/60       -      -     dense     -                                    1.000    -     causal
attn  joint  2      67/67       3x4x5  0+7   sparse    sta:window_thw=1x1x1,tile_thw=2x3x2  0.298    2.7x
attn  self   2      60/60       -      -     dense     -                                    1.000    -     layout_unknown (its tokens are not in the patch embedding's order)
causal: Causal attention. The mechanism is not causal token by token.
layout_unknown: The token grid is not proven. Pass cs.metadata(grid_thw=(T, H, W)).""",  # noqa: E501 - a table
    )


def test_it_decides_as_the_backend_does() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    backend, _ = record(model, *inputs)
    assert cs.explain(model, *inputs, policy=POLICY).sites == tuple(backend.decisions)


def test_the_report_is_valid_json() -> None:
    document = json.loads(cs.explain(TinyDiT(1), *dit_inputs(), policy=POLICY).to_json())
    assert document["num_graphs"] == 1
    assert document["sites"][0]["path"] == "blocks.0.attn1"
    assert document["sites"][0]["grid_thw"] == list(GRID)


def test_inputs_by_name_are_handed_on() -> None:
    video_, text, step = dit_inputs()
    report = cs.explain(TinyDiT(), video_, step=step, text=text, policy=POLICY)
    assert report.num_sparse == 2


def test_no_kernel_is_run() -> None:
    with mock.patch("compiled_sparse.ops.cpu.block_sparse_forward") as kernel:
        assert cs.explain(TinyDiT(), *dit_inputs(), policy=POLICY).num_sparse == 2
    kernel.assert_not_called()


def test_a_model_on_a_device_without_kernels_is_explained() -> None:
    with torch.device("meta"):
        model, inputs = TinyDiT(), dit_inputs()
    report = cs.explain(model, *inputs, policy=POLICY)
    assert [site.reason for site in report.sites] == ["device_unsupported", "cross_attention"] * 2


def test_a_model_far_too_large_to_run_is_explained() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x)).mean()).requires_grad_(False)
    report = cs.explain(model, video(grid=(61, 90, 160)))
    assert report.sites[0].is_sparse
    assert report.sites[0].query_shape == (1, 2, 878400, 8)


def test_the_model_is_not_changed() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model(*inputs)
    cs.explain(model, *inputs, policy=POLICY)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(*inputs), dense)


def test_it_can_be_asked_any_number_of_times_and_the_model_compiled_afterwards() -> None:
    model, x = Tiny(lambda m, x: m.attn(raster(x))), video()
    limit = torch._dynamo.config.recompile_limit
    reports = [cs.explain(model, x, policy=POLICY) for _ in range(limit + 2)]
    assert [report.num_sparse for report in reports] == [1] * (limit + 2)
    assert_close(compile_sparse(model)(x), expected_output(model, x))


def test_a_compiled_model_is_explained_before_and_after_its_first_call() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    compiled = compile_sparse(model)
    assert cs.explain(compiled, *inputs, policy=POLICY).num_sparse == 2
    first = compiled(*inputs)
    assert cs.explain(compiled, *inputs, policy=POLICY).num_sparse == 2
    assert torch.equal(compiled(*inputs), first)


def test_a_model_compiled_in_place_is_explained_before_and_after_its_first_call() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    model.compile(backend="compiled_sparse", options={"policy": POLICY, "inner": "eager"})
    report = cs.explain(model, *inputs, policy=POLICY)
    assert report.num_sparse == 2
    assert report.sites[0].path == "blocks.0.attn1"
    first = model(*inputs)
    assert cs.explain(model, *inputs, policy=POLICY).num_sparse == 2
    assert torch.equal(model(*inputs), first)


def test_functions_are_explained() -> None:
    x = torch.randn(1, 2, 60, 8)
    report = cs.explain(lambda q: F.scaled_dot_product_attention(q, q, q), x, policy=POLICY)
    (site,) = report.sites
    assert (site.path, site.reason) == ("", "layout_unknown")


def test_metadata_counts() -> None:
    with cs.metadata(grid_thw=GRID):
        (site,) = cs.explain(Attention(), tokens(), policy=POLICY).sites
    assert (site.is_sparse, site.layout_origin) == (True, "metadata")


def test_graph_breaks_are_counted_and_calls_behind_them_listed() -> None:
    class Broken(TinyDiT):
        def forward(self, *inputs: Tensor) -> Tensor:
            out = super().forward(*inputs)
            torch._dynamo.graph_break()
            return self.blocks[0].attn1(out.flatten(2)[..., :16])

    report = cs.explain(Broken(1), *dit_inputs(), policy=POLICY)
    assert report.num_graphs == 2
    assert [site.reason for site in report.sites] == ["", "cross_attention", "layout_unknown"]
    assert "2 graphs" in report.summary()


def test_a_call_under_other_shapes_is_a_report_of_its_own() -> None:
    model = TinyDiT(1)
    for grid in (GRID, (5, 7, 6)):
        report = cs.explain(model, *dit_inputs(grid), policy=POLICY)
        assert report.sites[0].grid_thw == grid


FLAT = cs.STA(window_thw=(3, 3), tile_thw=(2, 2))


@pytest.mark.parametrize(
    ("policy", "own", "problem"),
    [
        (POLICY, None, ""),
        (None, None, ""),
        (FLAT, None, "2 attention calls the policy wants sparse stay dense"),
        ({"blocks.0.*": FLAT, "*": "dense"}, None, "1 attention calls the policy wants sparse"),
        ({"layers.*": POLICY}, None, "no rule of the policy matches any video attention call"),
        ({"layers.*": "dense"}, None, ""),
        (None, FLAT, "2 attention calls the policy wants sparse stay dense"),
    ],
)
def test_the_report_notes_what_strict_raises(policy: Any, own: Any, problem: str) -> None:
    model, inputs = TinyDiT(), dit_inputs()
    if own is not None:
        cs.attach(model, own)
    report = cs.explain(model, *inputs, policy=policy)
    compiled = compile_sparse(model, policy=policy, strict=True)
    if not problem:
        assert report.strict_problems == ()
        compiled(*inputs)
        return
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(*inputs)
    error = caught.value.inner_exception
    assert isinstance(error, StrictRewriteError)
    assert report.strict_problems[0].startswith(problem)
    assert report.strict_problems[0] == f"{error.problem}: {error.got}. Next: {error.next_step}"


def test_each_call_knows_its_layer_and_its_config() -> None:
    sites = cs.explain(TinyDiT(), *dit_inputs(), policy=POLICY).sites
    assert [site.layer for site in sites if site.is_sparse] == [0, 1]
    assert [site.config for site in sites] == [POLICY, None, POLICY, None]


def test_an_unknown_policy_is_an_error_at_once() -> None:
    with pytest.raises(UnknownMechanismError, match="stb"):
        cs.explain(TinyDiT(1), *dit_inputs(), policy="stb")
