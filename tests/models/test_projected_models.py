"""Real models with learned projections, compiled, against the eager reference call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch._dynamo.utils
from builders import BUILDERS
from builders.base import Case
from modules import assert_close
from projected import PROJ
from projected import Projected
from projected import open_projections
from test_gated_models import by_block
from test_gated_models import whole
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.attach import Handle

pytestmark = pytest.mark.usefixtures("fresh_compiler")

RUNS = cs.SLA(topk_ratio=0.3, block_q=8, block_k=4)
BOXES = cs.SLA(topk_ratio=0.3, block_q=(2, 3, 2), block_k=(1, 2, 3), feature_map="elu")
CONFIGS = (RUNS, BOXES)
MODELS = ("wan image", "hunyuan video", "cogvideox 2b", "cogvideox 1.5", "ltx", "wan vace")


def prepare(name: str, config: cs.SLA) -> tuple[Case, Handle]:
    """Return an attached model whose projections are not zero."""
    case = harness.build(BUILDERS[name])
    handle = cs.attach(case.model, config)
    open_projections(case.model, handle.projections)
    return case, handle


def expected(name: str, case: Case, handle: Handle, config: cs.SLA) -> Tensor:
    """Run the model eagerly by the reference."""
    builder = BUILDERS[name]
    calls = [
        (config, cs.Text(truth.before, truth.after)) if truth.kind == "video" else None
        for truth in harness.truths(builder)
    ]
    with Projected(calls, case.model, handle, builder.grid) as mode:
        output = harness.outputs(case)
    assert mode.count == len(calls)
    return output


def assert_gradients_of_projections(case: Case, handle: Handle, actual: Tensor, want: Any) -> None:
    """Check the gradients of every projection; each must have one."""
    parameters = dict(case.model.named_parameters())
    names = [f"{path}.{part}" for path in handle.projections for part in ("weight", "bias")]
    found = torch.autograd.grad(actual.square().sum(), [parameters[name] for name in names])
    for name, one, other in zip(names, found, want, strict=True):
        assert PROJ in name
        assert other.abs().max() > 0
        assert_close(one, other)


@pytest.mark.parametrize("compile_model", [pytest.param(whole, marks=pytest.mark.slow), by_block])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [RUNS, pytest.param(BOXES, marks=pytest.mark.slow)])
def test_a_projected_wan_is_one_artifact_with_the_gradients_of_every_projection(
    compile_model: Callable[..., Any], inner: str, config: cs.SLA
) -> None:
    case, handle = prepare("wan", config)
    want = expected("wan", case, handle, config)
    parameters = dict(case.model.named_parameters())
    learned = [parameters[f"{p}.{part}"] for p in handle.projections for part in ("weight", "bias")]
    want_gradients = torch.autograd.grad(want.square().sum(), learned)
    torch._dynamo.utils.counters.clear()
    actual = harness.outputs(case, compile_model(case.model, inner=inner))
    assert_close(actual, want)
    assert_gradients_of_projections(case, handle, actual, want_gradients)
    assert harness.num_graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=["runs", "boxes"])
@pytest.mark.parametrize("name", MODELS)
def test_the_projections_of_other_models_are_found_in_their_graphs(
    name: str, config: cs.SLA
) -> None:
    case, handle = prepare(name, config)
    with torch.no_grad():
        want = expected(name, case, handle, config)
        dense = harness.outputs(case)
        actual = harness.outputs(case, whole(case.model, inner="eager"))
    assert_close(actual, want)
    assert (want - dense).abs().max() > 1e-2 * dense.abs().max()
    count = sum(truth.kind == "video" for truth in harness.truths(BUILDERS[name]))
    assert len(handle.projections) == count


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=["runs", "boxes"])
@pytest.mark.parametrize("name", ["wan image", "hunyuan video", "ltx"])
def test_models_compiled_by_block_have_their_projections(name: str, config: cs.SLA) -> None:
    case, handle = prepare(name, config)
    with torch.no_grad():
        want = expected(name, case, handle, config)
    grid = BUILDERS[name].grid
    video = [t for t in harness.truths(BUILDERS[name]) if t.kind == "video"]
    text = cs.Text(video[0].before, video[0].after)
    with torch.no_grad(), cs.metadata(grid_thw=grid, text=text):
        actual = harness.outputs(case, by_block(case.model, inner="eager"))
    assert_close(actual, want)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=["runs", "boxes"])
def test_dense_attention_is_what_all_blocks_and_closed_projections_give(config: cs.SLA) -> None:
    everything = config.with_sparsity(0.0)
    assert isinstance(everything, cs.SLA)
    case, handle = prepare("wan", everything)
    open_projections(case.model, handle.projections, scale=0.0)
    with torch.no_grad():
        dense = harness.outputs(case)
        assert_close(harness.outputs(case, whole(case.model)), dense)
