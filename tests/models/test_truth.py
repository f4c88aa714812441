"""The truth that the builders state, checked on the models themselves without a compiler."""

from __future__ import annotations

import itertools

import harness
import pytest
import torch
from builders import BUILDERS
from builders.base import Builder
from builders.base import Case
from builders.scope import OUT_OF_SCOPE
from torch import Tensor

# Where each of these hands over tokens, the order is the pipeline's and stands in its code.
EMBEDDING = [name for name, builder in BUILDERS.items() if builder.axes]
BATCHES = (1, 2)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_call_is_stated_with_its_length(name: str) -> None:
    builder = BUILDERS[name]
    with torch.no_grad():
        for batch in BATCHES:
            calls = harness.eager_calls(harness.build(builder, batch))
            truths = harness.truths(builder, batch)
            assert len(calls) == len(truths)
            for call, truth in zip(calls, truths, strict=True):
                if truth.kind == "video":
                    length = torch.Size(builder.grid).numel() + truth.before + truth.after
                    assert call["query"].shape[2] == call["key"].shape[2] == length


@pytest.mark.parametrize("name", BUILDERS)
def test_a_case_is_the_same_each_time_and_finite(name: str) -> None:
    with torch.no_grad():
        first, second = (harness.outputs(harness.build(BUILDERS[name])) for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 1e-2


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_patch_of_the_input_is_the_token_that_the_truth_says(name: str) -> None:
    builder = BUILDERS[name]
    truths = harness.truths(builder)
    first = next((i for i, truth in enumerate(truths) if truth.kind == "video"), None)
    if first is None:
        assert {truth.kind for truth in truths} <= {"cross", "text", "partial", "several"}
        return
    case = harness.build(builder)
    with torch.no_grad():
        plain = _query(case, first)
        for place in _places(builder.grid):
            changed = _query(_with_patch_changed(case, builder, place), first) != plain
            tokens = changed.any(dim=3).any(dim=1)[0].nonzero().flatten().tolist()
            assert tokens == [truths[first].before + _raster(place, builder.grid)], place


def _places(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    ends = itertools.product(*((0, extent - 1) for extent in grid))
    return [*ends, tuple(extent // 2 for extent in grid)]


def _raster(place: tuple[int, ...], grid: tuple[int, ...]) -> int:
    index = 0
    for at, extent in zip(place, grid, strict=True):
        index = index * extent + at
    return index


def _query(case: Case, index: int) -> Tensor:
    return harness.eager_calls(case)[index]["query"]


def _with_patch_changed(case: Case, builder: Builder, place: tuple[int, ...]) -> Case:
    video = case.inputs[builder.video].clone()
    box = [slice(None)] * video.dim()
    for axis, at, extent in zip(builder.axes, place, builder.grid, strict=True):
        side = video.shape[axis] // extent
        box[axis] = slice(at * side, (at + 1) * side)
    video[tuple(box)] += torch.randn_like(video[tuple(box)])
    return Case(case.model, {**case.inputs, builder.video: video})


def test_every_transformer_of_the_installed_release_is_built_or_listed_with_its_reason() -> None:
    from diffusers.models import transformers

    known = {builder.model for builder in BUILDERS.values()}
    present = {name for name, value in vars(transformers).items() if isinstance(value, type)}
    assert not known & set(OUT_OF_SCOPE)
    assert present <= known | set(OUT_OF_SCOPE), sorted(present - known - set(OUT_OF_SCOPE))
    assert present >= known
