"""Pictures of patterns, tile orders, policies and measurements. Needs matplotlib, and no display.

from compiled_sparse.plots import plot_pattern
plot_pattern(STA(window_thw=(3, 3, 3)), (21, 30, 52), path="pattern.png")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from compiled_sparse.config import MechanismConfig
from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.errors import ConfigError
from compiled_sparse.layout import Text
from compiled_sparse.plots.chunks import chunk_pattern
from compiled_sparse.plots.density_drawing import draw_density
from compiled_sparse.plots.drawing import draw
from compiled_sparse.plots.errors_drawing import draw_errors
from compiled_sparse.plots.files import picture_bytes
from compiled_sparse.plots.files import picture_path
from compiled_sparse.plots.files import write_picture
from compiled_sparse.plots.order import OrderMap
from compiled_sparse.plots.order_drawing import draw_order
from compiled_sparse.plots.pattern import Pattern
from compiled_sparse.plots.pattern import View
from compiled_sparse.plots.pattern import pattern_of

if TYPE_CHECKING:
    from compiled_sparse.calibration.by_density import ErrorsByDensity
    from compiled_sparse.policy_density import PolicyDensity


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A pattern, drawn.

    Args:
        png: The picture as a PNG file.
        title: What it shows, in words.
    """

    png: bytes
    title: str


def plot_pattern(
    config: MechanismConfig,
    grid_thw: tuple[int, ...],
    *,
    path: str | Path,
    text: Text | None = None,
    query_tile: tuple[int, ...] | None = None,
    head: int = 0,
    q: Tensor | None = None,
    k: Tensor | None = None,
    seed: int = 0,
) -> Path:
    """Draw which keys a mechanism lets each query see, and write the picture to a file.

    On the left the block mask: a dark cell where a query block attends to a key block, blocks in
    raster order of tiles, text in front or behind. On the right the frames of the grid: the tokens
    of one query block and the tokens they attend to.

    What a mechanism selects by content is an example then, on made-up queries and keys that vary
    smoothly over the grid, or on those given.

    Args:
        config: `Dense()`, or any mechanism, also one of another package whose kernel takes lists
            of blocks. Of a schedule by layers the first sparse layer is drawn.
        grid_thw: Token grid after patching, one to three axes.
        path: File to write; its suffix chooses the format, .png, .svg or .pdf.
        text: Text tokens around the video.
        query_tile: Position of the query block, in blocks per axis; the middle one by default.
            Blocks that are runs of the sequence have one axis. Of `VMoBA`, where every query
            selects for itself, that of the query, in tokens.
        head: Which head, where the config has a window per head or `q` and `k` are given.
        q: [batch, query heads, length, head_dim]; the first member of the batch is drawn.
        k: [batch, key heads, length, head_dim].
        seed: Seed of the made-up queries and keys.

    Returns:
        The absolute path of the picture.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ConfigError: if the config has no pattern, or none for this head, one of `q` and `k` is
            missing, or the path is not one of a picture or cannot be written to.
        LayoutError: if grid, tile and query tile do not fit, or there are too many blocks to draw.
    """
    target = picture_path(path)
    view = View(tuple(grid_thw), text or Text(), query_tile, head, _both(q, k), seed)
    return write_picture(draw(pattern_in(config, view)), target)


def plot_tile_order(order: OrderMap, *, path: str | Path) -> Path:
    """Draw the order in which blocks are numbered and tokens are listed tile by tile.

    On the left the tokens of the first tile with their places in the list. On the right a frame of
    each layer of tiles: the tiles with their numbers, the lighter the later, those that the border
    cuts off hatched.

    Args:
        order: What `compiled_sparse.plots.order.order_map` returned.
        path: File to write; its suffix chooses the format, .png, .svg or .pdf.

    Returns:
        The absolute path of the picture.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ConfigError: if the path is not one of a picture, or cannot be written to.
    """
    target = picture_path(path)
    return write_picture(draw_order(order), target)


def plot_density(table: PolicyDensity, *, path: str | Path) -> Path:
    """Draw a heat map of the densities of a policy, layers by steps.

    Args:
        table: What `compiled_sparse.policy_density.policy_density` returned.
        path: File to write; its suffix chooses the format, .png, .svg or .pdf.

    Returns:
        The absolute path of the picture.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ConfigError: if the path is not one of a picture, or cannot be written to.
    """
    target = picture_path(path)
    return write_picture(draw_density(table), target)


def plot_errors(errors: ErrorsByDensity, *, path: str | Path) -> Path:
    """Draw measured errors: against density, and layer by layer.

    On the left a point for each candidate, and a curve through the policies that `fit` makes of all
    of them. Their predicted gain is that of a single mechanism at the density where they stand.
    On the right a line for each candidate over the layers.

    Args:
        errors: What `compiled_sparse.calibration.errors_by_density` returned.
        path: File to write; its suffix chooses the format, .png, .svg or .pdf.

    Returns:
        The absolute path of the picture.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ConfigError: if the path is not one of a picture, or cannot be written to.
    """
    target = picture_path(path)
    return write_picture(draw_errors(errors), target)


def pattern_picture(
    config: MechanismConfig, grid_thw: tuple[int, ...], text: Text | None = None
) -> Picture:
    """Draw the picture of `plot_pattern` in memory, seen from the middle block of the first head.

    Args:
        config: As for `plot_pattern`.
        grid_thw: Token grid after patching, one to three axes.
        text: Text tokens around the video.

    Returns:
        The picture; the same arguments give the same bytes.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ConfigError: if the config has no pattern.
        LayoutError: if the grid does not fit, or there are too many blocks to draw.
    """
    pattern = pattern_in(config, View(tuple(grid_thw), text or Text()))
    return Picture(png=picture_bytes(draw(pattern)), title=pattern.title)


def pattern_in(config: MechanismConfig, view: View) -> Pattern:
    """Return what `plot_pattern` draws.

    Raises:
        ConfigError: if the config has no pattern, or none for this head.
        LayoutError: if grid, tile and query tile do not fit, or there are too many blocks to draw.
    """
    return chunk_pattern(config, view) if isinstance(config, VMoBA) else pattern_of(config, view)


def _both(q: Tensor | None, k: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if q is None and k is None:
        return None
    if q is None or k is None:
        raise ConfigError(
            "queries and keys are not given together",
            got="q without k" if k is None else "k without q",
            expected="both, or neither",
            next_step="pass q= and k= of one call, or leave them out for made-up ones",
        )
    return q, k
