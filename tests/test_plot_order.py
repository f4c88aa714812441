"""The picture of the tile order shows the numbers of `TileOrder`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from compiled_sparse.errors import LayoutError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import three_axes
from compiled_sparse.plots import plot_tile_order
from compiled_sparse.plots.order import order_map
from compiled_sparse.plots.order_drawing import draw_order

GRIDS = [((5, 7, 10), (2, 3, 4)), ((18, 11), (4, 4)), ((50,), (7,)), ((4, 4, 4), (4, 4, 4))]


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("grid", "tile"), GRIDS)
def test_every_token_has_its_tile_and_its_place(
    grid: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    drawn = order_map(grid, tile)
    counts = BlockLayout(grid, tile).tiles_per_axis
    expected = []
    for token in itertools.product(*map(range, grid)):
        number = 0
        for position, side, tiles in zip(token, tile, counts, strict=True):
            number = number * tiles + position // side
        expected.append((number, token))
    assert drawn.tiles.flatten().tolist() == [number for number, _ in expected]
    assert drawn.tiles.shape == three_axes(grid)
    listed = sorted(expected)  # by tile, then in raster order
    places = dict(zip(listed, range(len(listed)), strict=True))
    assert drawn.places.flatten().tolist() == [places[each] for each in expected]


def test_partial_tiles_are_those_at_the_border() -> None:
    drawn = order_map((4, 5), (2, 2))
    assert drawn.partial_tiles == (2, 5)
    assert "6 tiles, 2 of them partial; 20 tokens in 24 slots" in drawn.title
    assert order_map((4, 4), (2, 2)).partial_tiles == ()


def test_tiles_are_numbered_and_partial_ones_hatched() -> None:
    drawn = order_map((5, 4, 6), (2, 4, 4))
    figure = draw_order(drawn)
    titles = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(titles) == ["t = 0", "t = 1", "t = 0 to 1", "t = 2 to 3", "t = 4"]
    assert texts(titles["t = 0"]) == [str(i) for i in range(16)]
    assert texts(titles["t = 1"]) == [str(i) for i in range(16, 32)]
    assert texts(titles["t = 2 to 3"]) == ["2", "3"]
    hatched = {
        title: sum(patch.get_hatch() is not None for patch in axes.patches)
        for title, axes in titles.items()
    }
    assert list(hatched.values()) == [0, 0, 1, 1, 2]
    last = titles["t = 4"].patches[0]
    assert isinstance(last, Rectangle)
    assert (last.get_width(), last.get_height()) == (4, 4)


def test_of_many_tiles_the_first_of_each_row_is_numbered() -> None:
    figure = draw_order(order_map((40, 40), (2, 2)))
    assert texts(figure.axes[-1]) == [str(20 * row) for row in range(20)]
    # A tile of many tokens shows the places of its corners.
    figure = draw_order(order_map((40, 40), (20, 20)))
    assert texts(figure.axes[0]) == ["0", "19", "380", "399"]


@pytest.mark.parametrize(("grid", "tile"), GRIDS)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_written_for_every_number_of_axes(
    grid: tuple[int, ...], tile: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    path = plot_tile_order(order_map(grid, tile), path=tmp_path / f"order{suffix}")
    assert path == tmp_path / f"order{suffix}"
    assert path.stat().st_size > 3000


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(LayoutError, match="too many blocks to draw"):
        order_map((80, 80), (1, 1))
    with pytest.raises(LayoutError, match="different numbers of axes"):
        order_map((8, 8, 8), (4, 4))
