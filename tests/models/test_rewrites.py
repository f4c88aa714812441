"""Each model compiled: outcomes as expected, no wrong layout, values of the reference."""

from __future__ import annotations

import functools

import pytest
from builders import BUILDERS
from measure import TOLERANCE
from measure import Measured
from measure import Row
from measure import measure

pytestmark = pytest.mark.usefixtures("fresh_compiler")

FAST = (
    "wan",
    "wan vace",
    "wan animate",
    "skyreels v2",
    "chronoedit",
    "hunyuan video",
    "hunyuan video framepack",
    "hunyuan video image, token replace",
    "hunyuan video 1.5",
    "cogvideox 5b",
    "cogvideox 1.5",
    "ltx",
    "mochi",
    "allegro",
    "easyanimate",
    "flux",
    "sd3",
    "qwen image",
)

models = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in BUILDERS]
)


@functools.cache
def _row(name: str) -> Row:
    return measure(BUILDERS[name])


def _ways(name: str) -> tuple[Measured, ...]:
    return _row(name).ways


@models
def test_no_layout_is_wrong_and_the_narrowest_window_gives_what_the_reference_gives(
    name: str,
) -> None:
    for way in _ways(name):
        assert not way.wrong, way.way
        assert way.narrow_error < TOLERANCE, way.way


@models
def test_a_window_over_the_whole_grid_gives_what_dense_attention_gives(name: str) -> None:
    for way in _ways(name):
        assert way.exact_error < TOLERANCE, way.way


@models
def test_no_graph_break_is_added(name: str) -> None:
    row = _row(name)
    assert {way.graphs for way in row.ways} == {row.dense_graphs}
