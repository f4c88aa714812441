"""Hypothesis strategies for grids, tiles, windows and text."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from compiled_sparse.layout import BlockLayout

MAX_VIDEO_TOKENS = 120


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    """Small layouts of one to three axes; tiles may be larger than the grid."""
    axes = draw(st.integers(1, 3))
    grid: list[int] = []
    for _ in range(axes):
        room = MAX_VIDEO_TOKENS // math.prod(grid)
        grid.append(draw(st.integers(1, min(room, 40 if axes == 1 else 9))))
    tile = [draw(st.integers(1, extent + 2)) for extent in grid]
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return BlockLayout(tuple(grid), tuple(tile), before, after)


@st.composite
def layouts_with_windows(
    draw: st.DrawFn,
) -> tuple[BlockLayout, tuple[tuple[int, ...], ...]]:
    """A layout, and windows for one to three heads on it."""
    layout = draw(layouts())
    window = st.tuples(*(st.integers(1, tiles + 3) for tiles in layout.tiles_per_axis))
    return layout, tuple(draw(st.lists(window, min_size=1, max_size=3)))
