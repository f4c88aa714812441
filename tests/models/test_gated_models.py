"""Real models with learned gates, compiled, against the eager reference call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch._dynamo.utils
from builders import BUILDERS
from builders.base import Case
from gated import GATE
from gated import Gated
from gated import open_gates
from modules import assert_close
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.attach import Handle

pytestmark = pytest.mark.usefixtures("fresh_compiler")

JOINT = ("cogvideox 2b", "cogvideox 1.5", "consisid", "easyanimate", "qwen image")
ALONE = ("wan image", "wan animate", "wan vace", "ltx", "skyreels v2", "allegro")


def prepare(name: str, sparsity: float = 0.6) -> tuple[Case, Handle, cs.VSA]:
    """Return an attached model whose gates are not zero."""
    builder = BUILDERS[name]
    case = harness.build(builder)
    tile = (2, 3, 2)[-len(builder.grid) :]
    config = cs.VSA(sparsity=sparsity, tile_thw=tile, gate=GATE)
    handle = cs.attach(case.model, config)
    open_gates(case.model, handle.gates)
    return case, handle, config


def expected(name: str, case: Case, handle: Handle, config: cs.VSA) -> Tensor:
    """Run the model eagerly by the reference."""
    builder = BUILDERS[name]
    plain = cs.VSA(sparsity=config.sparsity, tile_thw=config.tile_thw)
    calls = [
        (plain, cs.Text(truth.before, truth.after)) if truth.kind == "video" else None
        for truth in harness.truths(builder)
    ]
    with Gated(calls, case.model, handle.gates, builder.grid) as mode:
        output = harness.outputs(case)
    assert mode.count == len(calls)
    return output


def whole(model: Any, **options: Any) -> Callable[..., Any]:
    """Compile a model as one graph."""
    return torch.compile(model, backend="compiled_sparse", fullgraph=True, options=options)


def by_block(model: Any, **options: Any) -> Callable[..., Any]:
    """Compile a model's repeated blocks."""
    model.compile_repeated_blocks(backend="compiled_sparse", fullgraph=True, options=options)
    return model  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("compile_model", [whole, by_block])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_gated_wan_is_one_artifact_with_the_gradients_of_every_gate(
    compile_model: Callable[..., Any], inner: str
) -> None:
    case, handle, config = prepare("wan")
    want = expected("wan", case, handle, config)
    parameters = dict(case.model.named_parameters())
    gates = [parameters[f"{gate}.{part}"] for gate in handle.gates for part in ("weight", "bias")]
    want_gradients = torch.autograd.grad(want.square().sum(), gates)
    torch._dynamo.utils.counters.clear()
    actual = harness.outputs(case, compile_model(case.model, inner=inner))
    assert_close(actual, want)
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), gates), want_gradients, strict=True
    ):
        assert other.abs().max() > 0
        assert_close(one, other)
    assert harness.num_graphs() == 1


@pytest.mark.parametrize(
    "name",
    ["hunyuan video", *(pytest.param(name, marks=pytest.mark.slow) for name in JOINT + ALONE)],
)
def test_the_gates_of_other_models_are_found_in_their_graphs(name: str) -> None:
    case, handle, config = prepare(name)
    with torch.no_grad():
        want = expected(name, case, handle, config)
        dense = harness.outputs(case)
        actual = harness.outputs(case, whole(case.model, inner="eager"))
    assert_close(actual, want)
    assert (want - dense).abs().max() > 1e-2 * dense.abs().max()
    assert len(handle.gates) == sum(t.kind == "video" for t in harness.truths(BUILDERS[name]))


@pytest.mark.slow
def test_dense_attention_is_what_no_sparsity_and_closed_gates_give() -> None:
    case, handle, _ = prepare("wan", sparsity=0.0)
    open_gates(case.model, handle.gates, scale=0.0)
    with torch.no_grad():
        dense = harness.outputs(case)
        assert_close(harness.outputs(case, whole(case.model)), dense)
