"""Each model compiled: outcomes as expected, no wrong layout, values of the reference."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import harness
import pytest
import torch
from builders import BUILDERS
from builders.base import Case

pytestmark = pytest.mark.usefixtures("fresh_compiler")

_CROSS = "cross_attention"

# What becomes of each call, in the order in which graphs are compiled. Written by hand.
EXPECTED = {
    "wan": ["sparse", _CROSS] * 2,
    "wan image": ["sparse", _CROSS, _CROSS] * 2,
    "wan timesteps": ["sparse", _CROSS] * 2,
    "wan vace": ["sparse", _CROSS] * 3,
    "skyreels v2": ["sparse", _CROSS] * 2,
    "skyreels v2 causal": ["mask_unsupported", _CROSS] * 2,
    "chronoedit": ["sparse", _CROSS, _CROSS] * 2,
    "hunyuan video": ["not_video", "sparse", "sparse"],
    "hunyuan video image, channels": ["not_video", "sparse", "sparse"],
}
FAST = tuple(EXPECTED)

fast_then_slow = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in BUILDERS],
)


@dataclass(frozen=True)
class Runs:
    """A model run eagerly, compiled without us, and compiled with each of two windows."""

    case: Case
    dense: torch.Tensor
    plain: harness.Compiled
    spanning: harness.Compiled
    narrow: harness.Compiled


@functools.cache
def _runs(name: str) -> Runs:
    builder = BUILDERS[name]
    case, axes = harness.build(builder), len(builder.grid)
    with torch.no_grad():
        return Runs(
            case,
            harness.outputs(case),
            harness.compile_and_run(case, None),
            harness.compile_and_run(case, harness.spanning(axes)),
            harness.compile_and_run(case, harness.narrow(axes)),
        )


@pytest.mark.parametrize("name", EXPECTED)
def test_every_attention_call_is_explained(name: str) -> None:
    sites = _runs(name).narrow.sites
    assert [site.reason or site.decision for site in sites] == EXPECTED[name]


@fast_then_slow
def test_no_layout_is_wrong_and_a_narrow_window_gives_what_the_reference_gives(name: str) -> None:
    builder, runs = BUILDERS[name], _runs(name)
    sites, wrong = harness.sites_of_calls(runs.narrow, harness.truths(builder), builder.grid)
    assert not wrong
    with torch.no_grad():
        expected = harness.replay(runs.case, sites, harness.narrow(len(builder.grid)))
    assert harness.relative_error(runs.narrow.output, expected) < 1e-5
    if any(sites):
        assert harness.relative_error(expected, runs.dense) > 1e-3, "the window hides nothing"


@fast_then_slow
def test_a_window_over_the_whole_grid_gives_what_dense_attention_gives(name: str) -> None:
    runs = _runs(name)
    assert runs.spanning.executed == runs.narrow.executed
    assert harness.relative_error(runs.spanning.output, runs.dense) < 1e-5


@fast_then_slow
def test_no_graph_break_is_added(name: str) -> None:
    runs = _runs(name)
    assert runs.narrow.graphs == runs.plain.graphs


def test_the_builders_tell_full_attention_from_other_calls() -> None:
    kinds = Counter(
        truth.kind for builder in BUILDERS.values() for truth in harness.truths(builder)
    )
    assert min(kinds[kind] for kind in ("video", "cross", "text", "partial")) > 1
