"""Patterns as pictures: the block mask on the left, the frames of the grid on the right."""

from __future__ import annotations

import math
from typing import Any

from compiled_sparse.errors import MissingExtraError
from compiled_sparse.layout import three_axes
from compiled_sparse.plots.pattern import Pattern

MAX_FRAMES = 24

# Colours of Okabe and Ito, told apart with every kind of colour vision; greys for the rest.
HIDDEN = "#e9ecef"
VISIBLE = "#56b4e9"
QUERY = "#d55e00"
MASK = "#0072b2"
TEXT = "#009e73"
LINE = "#ffffff"

SIZE = (12.0, 5.4)
SPLIT = (5.0, 7.0)


def draw(pattern: Pattern) -> Any:
    """Return a figure of a pattern.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure()
    left, right = figure.subfigures(1, 2, width_ratios=SPLIT, wspace=0.02)
    _draw_mask(left, pattern)
    draw_frames(right, pattern)
    figure.suptitle(pattern.title, fontsize=11)
    return figure


def new_figure() -> Any:
    """Return an empty figure that needs no display.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", extra="plots", purpose="drawing a picture") from None
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _draw_mask(panel: Any, pattern: Pattern) -> None:
    from matplotlib.colors import ListedColormap

    rows, columns = pattern.mask.shape
    axes = panel.subplots()
    axes.imshow(
        pattern.mask.numpy(),
        cmap=ListedColormap([HIDDEN, MASK, QUERY, TEXT]),
        vmin=0,
        vmax=3,
        interpolation="auto",
        interpolation_stage="rgba",
        aspect=columns / rows,
    )
    axes.set_title(f"Block mask: {pattern.words.mask}", fontsize=9)
    axes.set(xlabel="key block", ylabel="query block")
    whole_numbers(axes.xaxis, axes.yaxis)
    axes.annotate(
        f"{pattern.words.query}\non the right",
        xy=(1.0, 1 - (pattern.row + 0.5) / rows),
        xytext=(1.06, 1 - (pattern.row + 0.5) / rows),
        xycoords="axes fraction",
        arrowprops={"arrowstyle": "-|>", "color": QUERY, "shrinkA": 0, "shrinkB": 0},
        color=QUERY,
        fontsize=8,
        va="center",
    )


def whole_numbers(*axes: Any) -> None:
    """Have x or y axes show whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def draw_frames(panel: Any, pattern: Pattern) -> None:
    """Draw the frames of the grid, every nth if there are many."""
    from matplotlib.colors import ListedColormap

    num_frames, height, width = three_axes(tuple(pattern.tokens.shape))
    frames = list(range(0, num_frames, -(-num_frames // MAX_FRAMES)))
    classes = pattern.tokens.reshape(num_frames, height, width).numpy()
    colours = ListedColormap([HIDDEN, VISIBLE, QUERY])
    for axes, frame in zip(
        panels(panel, len(frames), height, width, SPLIT[1]), frames, strict=True
    ):
        axes.imshow(
            classes[frame],
            cmap=colours,
            vmin=0,
            vmax=2,
            interpolation="nearest",
            aspect="equal" if height > 1 else width / 4,
        )
        _draw_tile_borders(axes, pattern, height, width)
        if pattern.tokens.dim() == 3:
            axes.set_title(f"t = {frame}", fontsize=8, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _draw_legend(panel, pattern)


def panels(panel: Any, num_frames: int, height: int, width: int, space: float) -> list[Any]:
    """Return axes for frames, in the arrangement that shows them largest.

    Args:
        panel: The subfigure.
        num_frames: How many frames there are.
        height: Tokens of a frame from top to bottom.
        width: Tokens of a frame from left to right.
        space: Width of the subfigure in inches.
    """

    def scale(columns: int) -> float:
        rows = math.ceil(num_frames / columns)
        return min(space * height / (columns * width), 0.75 * SIZE[1] / rows)

    columns = max(range(1, num_frames + 1), key=scale)
    grid = panel.subplots(-(-num_frames // columns), columns, squeeze=False).ravel()
    for axes in grid[num_frames:]:
        axes.set_axis_off()
    return list(grid[:num_frames])


def _draw_tile_borders(axes: Any, pattern: Pattern, height: int, width: int) -> None:
    if not pattern.tile:
        return
    _, down, across = three_axes(pattern.tile)
    style = {"colors": LINE, "linewidth": 0.7}
    if len(pattern.tile) > 1:
        rows = [y - 0.5 for y in range(down, height, down)]
        axes.hlines(rows, -0.5, width - 0.5, **style)
    columns = [x - 0.5 for x in range(across, width, across)]
    axes.vlines(columns, -0.5, height - 0.5, **style)


def _draw_legend(panel: Any, pattern: Pattern) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(color=QUERY, label=pattern.words.query),
        Patch(color=VISIBLE, label="keys it attends to"),
        Patch(color=HIDDEN, label=pattern.words.hidden),
    ]
    if pattern.has_text:
        entries.append(Patch(color=TEXT, label="text: seen by all, sees all"))
    panel.legend(handles=entries, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
