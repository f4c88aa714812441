"""Pictures of attention patterns. Needs matplotlib, draws without a display.

from compiled_sparse.plots import plot_pattern
plot_pattern(STA(window_thw=(3, 3, 3)), (21, 30, 52), path="pattern.png")
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from compiled_sparse.config import STA
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MissingExtraError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.pattern import effective_width
from compiled_sparse.pattern import sta_density
from compiled_sparse.pattern import window_start
from compiled_sparse.windows import Window

if TYPE_CHECKING:
    import numpy as np

MAX_BLOCKS = 4096
MAX_FRAMES = 24

# Colours of Okabe and Ito, told apart with every kind of colour vision; greys for the rest.
_HIDDEN = "#e9ecef"
_VISIBLE = "#56b4e9"
_QUERY = "#d55e00"
_MASK = "#0072b2"
_TEXT = "#009e73"
_LINE = "#ffffff"

_SIZE = (12.0, 5.4)
_SPLIT = (5.0, 7.0)


@dataclass(frozen=True)
class _Pattern:
    """What is drawn: one head's window on one layout, seen from one tile."""

    layout: BlockLayout
    window: Window
    query_tile: tuple[int, ...]

    @property
    def query_block(self) -> int:
        """Number of the query tile among all blocks."""
        index = 0
        for position, count in zip(self.query_tile, self.layout.tiles_per_axis, strict=True):
            index = index * count + position
        return index + self.layout.num_text_blocks_before


def plot_pattern(
    config: MechanismConfig,
    grid_thw: tuple[int, ...],
    *,
    path: str | Path,
    text: Text | None = None,
    query_tile: tuple[int, ...] | None = None,
    head: int = 0,
) -> Path:
    """Draw which keys a mechanism lets each query see, and write the picture to a file.

    On the left the block mask: a dark cell where a query block attends to a key block, blocks in
    raster order of tiles, text in front or behind. On the right the frames of the grid: the tokens
    of one query tile and the tokens they attend to.

    Args:
        config: The mechanism; `STA` in this release.
        grid_thw: Token grid after patching, one to three axes.
        path: File to write; its suffix chooses the format, such as .png, .svg or .pdf.
        text: Text tokens around the video.
        query_tile: Position of the query tile, in tiles per axis; the middle one by default.
        head: Which head's window, where the config has one per head.

    Returns:
        The absolute path of the picture.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ConfigError: if the config has no pattern, or no window for this head.
        LayoutError: if grid, tile and query tile do not fit, or there are too many blocks to draw.
    """
    pattern = _pattern(config, tuple(grid_thw), text or Text(), query_tile, head)
    figure = _figure()
    left, right = figure.subfigures(1, 2, width_ratios=_SPLIT, wspace=0.02)
    _draw_mask(left, pattern)
    _draw_frames(right, pattern)
    figure.suptitle(_title(pattern), fontsize=11)
    target = Path(path).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    return target


def _pattern(
    config: MechanismConfig,
    grid: tuple[int, ...],
    text: Text,
    query_tile: tuple[int, ...] | None,
    head: int,
) -> _Pattern:
    if not isinstance(config, STA):
        raise ConfigError(
            "this config has no pattern to draw",
            got=repr(config),
            expected="STA(...)",
            next_step="pass the config of a mechanism with a fixed window",
        )
    if not 0 <= head < len(config.windows) and len(config.windows) > 1:
        raise ConfigError(
            "no window for this head",
            got=f"head {head}",
            expected=f"a head from 0 to {len(config.windows) - 1}",
            next_step="pass head=0, for instance",
        )
    layout = BlockLayout(grid, config.resolve_tile(grid), text.before, text.after)
    if layout.num_blocks > MAX_BLOCKS:
        raise LayoutError(
            "too many blocks to draw",
            got=f"{layout.num_blocks} blocks of tile {layout.tile} on grid {grid}",
            expected=f"at most {MAX_BLOCKS}",
            next_step="draw a smaller grid or larger tiles",
        )
    window = config.windows[head if len(config.windows) > 1 else 0]
    return _Pattern(layout, window, _checked_tile(layout, query_tile))


def _checked_tile(layout: BlockLayout, tile: tuple[int, ...] | None) -> tuple[int, ...]:
    counts = layout.tiles_per_axis
    if tile is None:
        return tuple(count // 2 for count in counts)
    fits = len(tile) == len(counts) and all(0 <= i < n for i, n in zip(tile, counts, strict=False))
    if not fits:
        raise LayoutError(
            "query_tile is not on the grid of tiles",
            got=repr(tuple(tile)),
            expected=f"one index per axis, each below {counts}",
            next_step="pass query_tile in tiles, not in tokens",
        )
    return tuple(tile)


def _figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", extra="plots", purpose="drawing a pattern") from None
    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(pattern: _Pattern) -> str:
    layout = pattern.layout
    density = sta_density(layout, (pattern.window,))
    text = layout.text_before + layout.text_after
    tokens = f"{layout.num_tokens:,} tokens" + (f", {text} of them text" if text else "")
    return (
        f"Sliding tile attention, window {_times(pattern.window)} tiles of "
        f"{_times(layout.tile)} tokens, grid {_times(layout.grid)} ({tokens}): "
        f"density {density:.3f}"
    )


def _times(extents: tuple[int, ...]) -> str:
    return "×".join(map(str, extents))


def _axis_window(pattern: _Pattern, axis: int, tile: int) -> range:
    """The tiles of one axis that a tile of this axis sees."""
    num_tiles, nominal = pattern.layout.tiles_per_axis[axis], pattern.window[axis]
    start = window_start(num_tiles, nominal, tile)
    return range(start, start + effective_width(num_tiles, nominal))


def _block_mask(pattern: _Pattern) -> np.ndarray[Any, Any]:
    """Return [blocks, blocks]: 0 hidden, 1 seen, 2 seen by the query tile, 3 text."""
    import numpy as np

    per_axis = []
    for axis, count in enumerate(pattern.layout.tiles_per_axis):
        visible = np.zeros((count, count), dtype=np.uint8)
        for tile in range(count):
            visible[tile, list(_axis_window(pattern, axis, tile))] = 1
        per_axis.append(visible)
    layout = pattern.layout
    mask = np.full((layout.num_blocks, layout.num_blocks), 3, dtype=np.uint8)
    first = layout.num_text_blocks_before
    video = slice(first, first + layout.num_video_blocks)
    mask[video, video] = functools.reduce(np.kron, per_axis)
    row = mask[pattern.query_block]
    row[row == 1] = 2
    return mask


def _draw_mask(panel: Any, pattern: _Pattern) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    mask = _block_mask(pattern)
    size, row = len(mask), pattern.query_block
    axes = panel.subplots()
    axes.imshow(
        mask,
        cmap=ListedColormap([_HIDDEN, _MASK, _QUERY, _TEXT]),
        vmin=0,
        vmax=3,
        interpolation="auto",
        interpolation_stage="rgba",
    )
    axes.set_title("Block mask: a query block attends to the coloured key blocks", fontsize=9)
    axes.set(xlabel="key block", ylabel="query block")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.annotate(
        "query tile\non the right",
        xy=(1.0, 1 - (row + 0.5) / size),
        xytext=(1.06, 1 - (row + 0.5) / size),
        xycoords="axes fraction",
        arrowprops={"arrowstyle": "-|>", "color": _QUERY, "shrinkA": 0, "shrinkB": 0},
        color=_QUERY,
        fontsize=8,
        va="center",
    )


def _draw_frames(panel: Any, pattern: _Pattern) -> None:
    from matplotlib.colors import ListedColormap

    layout = pattern.layout
    num_frames, height, width = (1,) * (3 - len(layout.grid)) + layout.grid
    frames = list(range(0, num_frames, -(-num_frames // MAX_FRAMES)))
    columns = _columns(len(frames), width / height)
    rows = -(-len(frames) // columns)
    grid = panel.subplots(rows, columns, squeeze=False).ravel()
    classes = _token_classes(pattern).reshape(num_frames, height, width)
    colours = ListedColormap([_HIDDEN, _VISIBLE, _QUERY])
    for axes, frame in zip(grid, frames, strict=False):
        axes.imshow(
            classes[frame],
            cmap=colours,
            vmin=0,
            vmax=2,
            interpolation="nearest",
            aspect="equal" if height > 1 else width / 4,
        )
        _draw_tile_borders(axes, layout, height, width)
        if len(layout.grid) == 3:
            axes.set_title(f"t = {frame}", fontsize=8, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes in grid[len(frames) :]:
        axes.set_axis_off()
    _draw_legend(panel, layout)


def _columns(num_frames: int, aspect: float) -> int:
    """The number of columns that shows frames of this width per height largest."""

    def scale(columns: int) -> float:
        rows = math.ceil(num_frames / columns)
        return min(_SPLIT[1] / (columns * aspect), 0.75 * _SIZE[1] / rows)

    return max(range(1, num_frames + 1), key=scale)


def _token_classes(pattern: _Pattern) -> np.ndarray[Any, Any]:
    """Return per video token 0 for hidden, 1 for visible, 2 for the query tile itself."""
    import numpy as np

    layout = pattern.layout
    classes = np.zeros(layout.grid, dtype=np.uint8)
    window, query = [], []
    for axis, (side, tile) in enumerate(zip(layout.tile, pattern.query_tile, strict=True)):
        seen = _axis_window(pattern, axis, tile)
        window.append(slice(seen.start * side, seen.stop * side))
        query.append(slice(tile * side, (tile + 1) * side))
    classes[tuple(window)] = 1
    classes[tuple(query)] = 2
    return classes


def _draw_tile_borders(axes: Any, layout: BlockLayout, height: int, width: int) -> None:
    sides = (1,) * (3 - len(layout.tile)) + layout.tile
    style = {"colors": _LINE, "linewidth": 0.7}
    if len(layout.grid) > 1:
        rows = [y - 0.5 for y in range(sides[1], height, sides[1])]
        axes.hlines(rows, -0.5, width - 0.5, **style)
    columns = [x - 0.5 for x in range(sides[2], width, sides[2])]
    axes.vlines(columns, -0.5, height - 0.5, **style)


def _draw_legend(panel: Any, layout: BlockLayout) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(color=_QUERY, label="query tile"),
        Patch(color=_VISIBLE, label="keys it attends to"),
        Patch(color=_HIDDEN, label="not attended to"),
    ]
    if layout.text_before + layout.text_after:
        entries.append(Patch(color=_TEXT, label="text: seen by all, sees all"))
    panel.legend(handles=entries, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
