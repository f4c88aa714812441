"""The tile order as a picture: one tile token by token on the left, all tiles on the right."""

from __future__ import annotations

from typing import Any

from compiled_sparse.plots.drawing import HIDDEN
from compiled_sparse.plots.drawing import LINE
from compiled_sparse.plots.drawing import MASK
from compiled_sparse.plots.drawing import MAX_FRAMES
from compiled_sparse.plots.drawing import SPLIT
from compiled_sparse.plots.drawing import new_figure
from compiled_sparse.plots.drawing import panels
from compiled_sparse.plots.order import OrderMap

_INK = "#212529"
_TILE_FRAMES = 4
_MAX_NUMBERED_TOKENS = 128  # in a frame of one tile
_MAX_NUMBERED_TILES = 300  # in the whole picture
_DARKEST, _LIGHTEST = 0.45, 1.0  # the part of the colour map that ink can be read on
_HATCH: dict[str, Any] = {"edgecolor": _INK, "hatch": "////"}
_HATCHED: dict[str, Any] = {**_HATCH, "fill": False, "linewidth": 0, "alpha": 0.35}


def draw_order(order: OrderMap) -> Any:
    """Return a figure of a tile order.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure()
    left, right = figure.subfigures(1, 2, width_ratios=SPLIT, wspace=0.02)
    _draw_tokens(left, order)
    _draw_tiles(right, order)
    figure.suptitle(order.title, fontsize=11)
    return figure


def _draw_tokens(panel: Any, order: OrderMap) -> None:
    """Draw the places of the tokens of the first tile, frame by frame."""
    sides = [min(side, extent) for side, extent in zip(order.tile, order.grid, strict=True)]
    num_frames, height, width = sides
    shown = min(num_frames, _TILE_FRAMES)
    panel.suptitle("Tile 0: places of its tokens in the list", fontsize=9)
    for frame, axes in enumerate(panels(panel, shown, height, width, SPLIT[0])):
        _frame_axes(axes, height, width)
        axes.add_patch(_rectangle(0, 0, width, height, facecolor=HIDDEN, edgecolor=LINE))
        columns = [x for _ in range(height) for x in range(width)]
        rows = [y for y in range(height) for _ in range(width)]
        axes.plot(columns, rows, color=MASK, linewidth=0.8, alpha=0.45)
        places = order.places[frame, :height, :width].flatten().tolist()
        corners = {0, width - 1, height * width - width, height * width - 1}
        everything = height * width <= _MAX_NUMBERED_TOKENS
        for index in range(height * width) if everything else sorted(corners):
            _number(axes, columns[index], rows[index], places[index], HIDDEN, 1.0)
        if num_frames > 1:
            axes.set_title(f"t = {frame}", fontsize=8, pad=2)


def _draw_tiles(panel: Any, order: OrderMap) -> None:
    """Draw a frame of each layer of tiles, every nth if there are many."""
    from matplotlib.patches import Patch

    (num_frames, height, width), (depth, _, _) = order.grid, order.tile
    starts = list(range(0, num_frames, depth))
    starts = starts[:: -(-len(starts) // MAX_FRAMES)]
    numbered = order.order.total_num_tiles <= _MAX_NUMBERED_TILES
    what = "each tile" if numbered else "the first tile of a row"
    panel.suptitle(f"Tiles in the order of the list, the number of {what}", fontsize=9)
    for start, axes in zip(
        starts, panels(panel, len(starts), height, width, SPLIT[1]), strict=True
    ):
        _frame_axes(axes, height, width)
        _draw_frame(axes, order, start, numbered=numbered)
        last = min(start + depth, num_frames) - 1
        if len(order.order.grid_thw) == 3:
            axes.set_title(f"t = {start}" + f" to {last}" * (last > start), fontsize=8, pad=2)
    partial = Patch(facecolor=HIDDEN, label="partial tile", **_HATCH)
    if order.partial_tiles:
        panel.legend(handles=[partial], loc="outside lower center", fontsize=8, frameon=False)


def _draw_frame(axes: Any, order: OrderMap, frame: int, *, numbered: bool) -> None:
    from matplotlib import colormaps

    (_, height, width), (_, down, across) = order.grid, order.tile
    partial, last = set(order.partial_tiles), max(1, order.order.total_num_tiles - 1)
    for top in range(0, height, down):
        for left in range(0, width, across):
            tile = int(order.tiles[frame, top, left])
            size = min(across, width - left), min(down, height - top)
            colour = colormaps["viridis"](_DARKEST + (_LIGHTEST - _DARKEST) * tile / last)
            axes.add_patch(_rectangle(left, top, *size, facecolor=colour, edgecolor=LINE))
            if tile in partial:
                # Hatching has the colour of the edge, which is to be white.
                axes.add_patch(_rectangle(left, top, *size, **_HATCHED))
            if numbered or left == 0:
                x, y = left + (size[0] - 1) / 2, top + (size[1] - 1) / 2
                _number(axes, x, y, tile, LINE, 0.7)


def _number(axes: Any, x: float, y: float, number: int, ground: str, opacity: float) -> None:
    halo = {"boxstyle": "round,pad=0.15", "facecolor": ground, "alpha": opacity, "linewidth": 0}
    axes.text(x, y, f"{number}", fontsize=6, color=_INK, ha="center", va="center", bbox=halo)


def _frame_axes(axes: Any, height: int, width: int) -> None:
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_aspect("equal" if height > 1 else width / 4)
    axes.spines[:].set_visible(False)


def _rectangle(left: int, top: int, width: int, height: int, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left - 0.5, top - 0.5), width, height, **{"linewidth": 0.7, **style})
