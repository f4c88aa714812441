"""Batches whose prompts differ in length, and one compiled model at several resolutions."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from builders import BUILDERS
from builders.base import Case
from builders.base import Grid
from harness import TOLERANCE

pytestmark = pytest.mark.usefixtures("fresh_compiler")

BATCHED = ("hunyuan video", "qwen image", "cogvideox 5b")
GRIDS = {3: ((3, 4, 5), (5, 3, 4), (2, 5, 7), (3, 4, 5)), 2: ((6, 7), (7, 8), (5, 9), (6, 7))}
RESIZED = (
    "wan",
    "hunyuan video",
    "cogvideox 5b",
    "qwen image",
    "allegro",
    "easyanimate",
    "ltx",
    "sd3",
    "cosmos",
    "motif video",
    "helios",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in BATCHED else pytest.mark.slow) for n in BUILDERS]
)
def test_a_batch_with_prompts_of_several_lengths_is_right(name: str) -> None:
    builder = BUILDERS[name]
    config = harness.narrow(len(builder.grid))
    truths = harness.truths(builder, batch=2)
    with torch.no_grad():
        case = harness.build(builder, batch=2)
        run = harness.compile_and_run(case, config)
        sites, wrong = harness.sites_of_calls(run, truths, builder.grid)
        assert not wrong
        assert any(sites) or name not in BATCHED
        error = harness.relative_error(run.output, harness.replay(case, sites, config))
        assert error < harness.tolerance(case, sites, config, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIZED)
def test_three_resolutions_and_the_first_again_are_right_and_compile_as_often_as_without_us(
    name: str,
) -> None:
    builder = BUILDERS[name]
    grids = GRIDS[len(builder.grid)]
    model = harness.build(builder).model
    cases = [Case(model, harness.build(builder, grid=grid).inputs) for grid in grids]
    config = harness.narrow(len(builder.grid))
    with torch.no_grad():
        plain = _outputs_and_counts(cases, {"backend": "eager"})
        options = {"policy": config, "inner": "eager"}
        ours = _outputs_and_counts(cases, {"backend": "compiled_sparse", "options": options})
        for grid, case, dense, sparse in zip(grids, cases, plain[0], ours[0], strict=True):
            expected = harness.replay(case, _true_sites(name, grid), config)
            assert harness.relative_error(sparse, expected) < TOLERANCE, grid
            assert harness.relative_error(sparse, dense) > 100 * TOLERANCE, grid
    assert ours[1] == plain[1]
    assert ours[1][-1] == ours[1][-2], "the first resolution was compiled again"


def _true_sites(name: str, grid: Grid) -> list[Any]:
    return harness.true_sites(harness.truths(BUILDERS[name], grid=grid), grid)


def _outputs_and_counts(
    cases: list[Case], options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[int]]:
    """Return each output, and the number of graphs compiled after each call."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(cases[0].model, **options)
    outputs, counts = [], []
    for case in cases:
        outputs.append(harness.outputs(case, compiled))
        counts.append(harness.num_graphs())
    return outputs, counts
