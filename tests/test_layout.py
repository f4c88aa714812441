"""Grids, tiles and text as integers."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from strategies import layouts

from compiled_sparse.errors import LayoutError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.layout import _best_tile
from compiled_sparse.layout import auto_tile


def test_blocks_are_numbered_text_then_tiles_then_text() -> None:
    layout = BlockLayout((5, 7, 3), (2, 3, 2), text_before=13, text_after=25)
    assert layout.block_size == 12
    assert layout.tiles_per_axis == (3, 3, 2)
    assert layout.num_text_blocks_before == 2
    assert layout.num_video_blocks == 18
    assert layout.num_text_blocks_after == 3
    assert layout.num_blocks == 23
    assert layout.num_video_tokens == 105
    assert layout.num_tokens == 143
    assert layout.block_sizes[:2] == (12, 1)
    assert layout.block_sizes[2:8] == (12, 6, 12, 6, 4, 2)
    assert layout.block_sizes[-3:] == (12, 12, 1)


def test_padding_ratio_counts_unused_slots_per_token() -> None:
    assert BlockLayout((4, 4), (2, 2)).padding_ratio == 0.0
    assert BlockLayout((3,), (2,)).padding_ratio == pytest.approx(1 / 3)
    assert BlockLayout((2,), (2,), text_before=1).padding_ratio == pytest.approx(1 / 3)


@given(layouts())
def test_sizes_equal_those_of_naive_blocks(layout: BlockLayout) -> None:
    naive = oracle.blocks(layout.grid, layout.tile, layout.text_before, layout.text_after)
    assert layout.block_sizes == tuple(len(block) for block in naive)
    assert layout.num_blocks == len(naive)
    assert layout.num_tokens == sum(len(block) for block in naive)
    assert layout.block_size >= max(layout.block_sizes)


def test_equal_layouts_are_one_cache_key() -> None:
    first, second = BlockLayout((5, 7), (2, 3), 1), BlockLayout((5, 7), (2, 3), 1, 0)
    assert first == second
    assert hash(first) == hash(second)
    assert first != BlockLayout((7, 5), (2, 3), 1)


@pytest.mark.parametrize(
    "grid", [(), (0, 3), (3, -1), (1, 2, 3, 4), (2.0, 3), (True, 3), ("5", 3)], ids=repr
)
def test_a_grid_that_is_not_one_to_three_positive_integers_is_refused(grid: tuple) -> None:
    with pytest.raises(LayoutError, match="grid is not a tuple of axis lengths"):
        BlockLayout(grid, (2, 2))


def test_a_tile_that_is_not_positive_is_refused() -> None:
    with pytest.raises(LayoutError, match="tile is not a tuple of axis lengths"):
        BlockLayout((4, 4), (2, 0))


def test_a_tile_with_other_axes_than_the_grid_is_refused() -> None:
    with pytest.raises(LayoutError, match="different numbers of axes"):
        BlockLayout((4, 4), (2, 2, 2))


@pytest.mark.parametrize("count", [-1, 1.5, "3", None])
@pytest.mark.parametrize("side", ["before", "after"])
def test_text_that_is_not_a_count_is_refused(side: str, count: object) -> None:
    with pytest.raises(LayoutError, match=rf"Text\.{side} is not a token count"):
        Text(**{side: count})


def test_a_layout_with_negative_text_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"Text\.after"):
        BlockLayout((4,), (2,), text_after=-2)


def compact_tiles(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every tile of the documented kind, by brute force."""
    limit = 512 if len(grid) == 1 else 32
    sides = [
        [
            s
            for s in range(1, min(extent, limit) + 1)
            if s == 1 or -(-extent // s) != -(-extent // (s - 1))
        ]
        for extent in grid
    ]
    return [
        tile
        for tile in itertools.product(*sides)
        if min(128, math.prod(grid)) <= math.prod(tile) <= 512 and max(tile) <= 3 * min(tile)
    ]


def slots(grid: tuple[int, ...], tile: tuple[int, ...]) -> int:
    return math.prod(math.ceil(g / t) * t for g, t in zip(grid, tile, strict=True))


@pytest.mark.parametrize(
    "grid",
    [(21, 30, 52), (5, 7, 9), (13, 45, 80), (8, 24, 40), (31, 37, 41), (30, 52), (97, 89), (5003,)],
    ids=str,
)
def test_auto_tile_wastes_the_least_among_compact_tiles(grid: tuple[int, ...]) -> None:
    tile = auto_tile(grid)
    assert tile in compact_tiles(grid)
    assert slots(grid, tile) == min(slots(grid, each) for each in compact_tiles(grid))


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=40)
def test_auto_tile_wastes_the_least_on_any_image(height: int, width: int) -> None:
    grid = (height, width)
    tile = auto_tile(grid)
    assert all(1 <= side <= extent for side, extent in zip(tile, grid, strict=True))
    if compact := compact_tiles(grid):
        assert slots(grid, tile) == min(slots(grid, each) for each in compact)


def test_auto_tile_always_gives_the_same_tile() -> None:
    _best_tile.cache_clear()
    first = auto_tile((21, 30, 52))
    _best_tile.cache_clear()
    assert auto_tile((21, 30, 52)) == first == (7, 5, 13)


@pytest.mark.parametrize("grid", [(1,), (7,), (1, 1, 1), (5, 7, 3), (2, 3), (1, 8, 8)], ids=str)
def test_auto_tile_takes_a_tiny_grid_whole(grid: tuple[int, ...]) -> None:
    assert auto_tile(grid) == grid


@pytest.mark.parametrize("grid", [(1, 64, 64), (1, 1, 5000), (2, 100), (1, 5, 700)], ids=str)
def test_auto_tile_of_a_narrow_grid_stays_within_its_limits(grid: tuple[int, ...]) -> None:
    tile = auto_tile(grid)
    assert all(1 <= side <= min(extent, 32) for side, extent in zip(tile, grid, strict=True))
    assert math.prod(tile) <= 512


def test_auto_tile_refuses_what_is_no_grid() -> None:
    with pytest.raises(LayoutError, match="grid is not a tuple of axis lengths"):
        auto_tile((3, 0))
