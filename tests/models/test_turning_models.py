"""Real models whose layers take turns between chunks, compiled, against the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from builders import BUILDERS
from builders.base import Case
from layered import Layered
from modules import assert_close
from test_gated_models import by_block
from test_gated_models import whole
from torch import Tensor

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")

BY_NUMBER = cs.VMoBA(
    temporal_chunk_size=1,
    temporal_topk=2,
    spatial_chunk_size=(2, 3),
    spatial_topk=3,
    st_chunk_size=(2, 2, 3),
    st_topk=3,
    moba_select_mode="topk",
)
BY_THRESHOLD = cs.VMoBA(
    temporal_chunk_size=1.5,
    spatial_chunk_size=(2, 3),
    st_chunk_size=(2, 2, 3),
    moba_threshold=0.3,
    moba_threshold_type="head_global",
    temporal_layer=0,
    st_layer=2,
)
CONFIGS = {"number": BY_NUMBER, "threshold": BY_THRESHOLD}
HOW = [
    *((name, whole) for name in ("cogvideox 2b", "cogvideox 1.5")),
    *((name, how) for name in ("wan image", "hunyuan video", "ltx") for how in (whole, by_block)),
]


def expected(name: str, case: Case, config: cs.VMoBA) -> Tensor:
    """Run the model eagerly; the layers of a config are its calls over the video."""
    calls: list[Any] = []
    for truth in harness.truths(BUILDERS[name]):
        layer = sum(call is not None for call in calls)
        text = cs.Text(truth.before, truth.after)
        calls.append((config.for_layer(layer), text) if truth.kind == "video" else None)
    with torch.no_grad(), Layered(calls, BUILDERS[name].grid) as mode:
        output = harness.outputs(case)
    assert mode.count == len(calls)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("name", "compile_model"), HOW)
def test_the_layers_of_a_model_take_turns(
    name: str, config: cs.VMoBA, compile_model: Callable[..., Any]
) -> None:
    case = harness.build(BUILDERS[name])
    want = expected(name, case, config)
    dense = harness.outputs(case)
    assert (want - dense).abs().max() > 1e-3 * dense.abs().max()
    cs.attach(case.model, config)
    video = next(t for t in harness.truths(BUILDERS[name]) if t.kind == "video")
    layout = {"grid_thw": BUILDERS[name].grid, "text": cs.Text(video.before, video.after)}
    with torch.no_grad(), cs.metadata(**(layout if compile_model is by_block else {})):
        actual = harness.outputs(case, compile_model(case.model, inner="eager"))
    assert_close(actual, want)
