"""Grids, tiles and text as plain integers: which token belongs to which block.

A sequence is `text_before` text tokens, then the video tokens of a grid in raster order (the last
axis runs fastest), then `text_after` text tokens. Blocks are numbered in the same order: runs of
text, tiles in raster order of tiles, runs of text. Tiles at the upper borders may be partial, and
so may the last text run of each side. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from functools import lru_cache
from typing import TYPE_CHECKING
from typing import Any

from compiled_sparse.errors import LayoutError

if TYPE_CHECKING:
    from compiled_sparse.tile_order import TileOrder

MAX_GRID_AXES = 3
AUTO_TILE_VOLUME = 384
_AUTO_TILE_RANGE = (128, 512)
_AUTO_TILE_MAX_SIDE = 32
_AUTO_TILE_MAX_IMBALANCE = 3.0


@dataclass(frozen=True, slots=True)
class Text:
    """Text tokens around the video tokens of a sequence.

    Args:
        before: Number of text tokens in front of the video.
        after: Number of text tokens behind the video.
    """

    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise LayoutError(
                    f"Text.{name} is not a token count",
                    got=repr(value),
                    expected="an integer of at least 0",
                    next_step=f"pass Text({name}=<number of text tokens>)",
                )


@dataclass(frozen=True)
class BlockLayout:
    """How one sequence is cut into blocks.

    Args:
        grid: Tokens per axis, one to three axes, slowest first, e.g. (T, H, W).
        tile: Tokens per axis of one tile; the same number of axes.
        text_before: Text tokens in front of the grid.
        text_after: Text tokens behind the grid.

    Raises:
        LayoutError: if an extent is not positive, or grid and tile differ in their number of axes.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        check_extents("grid", self.grid)
        check_extents("tile", self.tile)
        if len(self.grid) != len(self.tile):
            raise LayoutError(
                "grid and tile have different numbers of axes",
                got=f"grid {self.grid}, tile {self.tile}",
                expected="one tile side per grid axis",
                next_step=f"pass a tile with {len(self.grid)} sides",
            )
        Text(self.text_before, self.text_after)

    @property
    def tiles_per_axis(self) -> tuple[int, ...]:
        """Number of tiles along each axis, partial ones included."""
        return tuple(tiles_along(self.grid, self.tile))

    @property
    def block_size(self) -> int:
        """Slots in one block: the tile's volume."""
        return math.prod(self.tile)

    @property
    def num_video_tokens(self) -> int:
        """Tokens on the grid."""
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence, text included."""
        return self.num_video_tokens + self.text_before + self.text_after

    @property
    def num_video_blocks(self) -> int:
        """Number of tiles."""
        return math.prod(self.tiles_per_axis)

    @property
    def num_text_blocks_before(self) -> int:
        """Number of text runs in front of the video."""
        return int(ceil_div(self.text_before, self.block_size))

    @property
    def num_text_blocks_after(self) -> int:
        """Number of text runs behind the video."""
        return int(ceil_div(self.text_after, self.block_size))

    @property
    def num_blocks(self) -> int:
        """Number of blocks, text runs included."""
        return self.num_text_blocks_before + self.num_video_blocks + self.num_text_blocks_after

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """Valid tokens of each block, in block order."""
        per_axis = [
            [min(side, extent - start) for start in range(0, extent, side)]
            for extent, side in zip(self.grid, self.tile, strict=True)
        ]
        video = [math.prod(sides) for sides in itertools.product(*per_axis)]
        before = self._run_sizes(self.text_before)
        after = self._run_sizes(self.text_after)
        return (*before, *video, *after)

    @property
    def padding_ratio(self) -> float:
        """Slots per token, minus one: 0.0 when every block is full."""
        return self.num_blocks * self.block_size / self.num_tokens - 1.0

    def _run_sizes(self, tokens: int) -> list[int]:
        return [min(self.block_size, tokens - i) for i in range(0, tokens, self.block_size)]


def ceil_div(number: Any, divisor: int) -> Any:
    """Return a quotient rounded up; the number may be symbolic."""
    return (number + divisor - 1) // divisor


def tiles_along(grid: Sequence[Any], tile: Sequence[int]) -> list[Any]:
    """Return the number of tiles along each axis, partial ones included; sizes may be symbolic."""
    return [ceil_div(extent, side) for extent, side in zip(grid, tile, strict=True)]


def check_extents(name: str, extents: Any) -> None:
    """Check that `extents` are one to three positive integers.

    Raises:
        LayoutError: if they are not.
    """
    is_short = isinstance(extents, tuple) and 1 <= len(extents) <= MAX_GRID_AXES
    if is_short and all(_is_positive(extent) for extent in extents):
        return
    raise LayoutError(
        f"{name} is not a tuple of axis lengths",
        got=repr(extents),
        expected=f"a tuple of 1 to {MAX_GRID_AXES} positive integers, slowest axis first",
        next_step=f"pass {name} like (21, 30, 52)",
    )


def three_axes(sides: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the sides of a grid or tile of one to three axes with leading ones."""
    t, h, w = (1,) * (MAX_GRID_AXES - len(sides)) + sides
    return t, h, w


def as_grid(value: object) -> tuple[int, ...]:
    """Return what was given as a grid, as a tuple of plain integers.

    Raises:
        LayoutError: if it is not one to three positive integers.
    """
    grid = _as_integers(value)
    check_extents("grid_thw", grid)
    return tuple(grid)


def _as_integers(value: Any) -> Any:
    """Return a sequence of integers of any kind as a tuple of plain ones, all else as it is."""
    with suppress(TypeError):
        return tuple(map(operator.index, value))
    return value


def latent_grid(raw_latent_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the token grid that a patch embedding makes of latents.

    Args:
        raw_latent_shape: Latent extents (T, H, W) before patching.
        patch_size: Latents per token along each axis; what does not fill a patch is dropped, as a
            patch embedding drops it.

    Raises:
        LayoutError: if shape and patch differ in their number of axes, or a patch does not fit.
    """
    patch = _as_integers(patch_size)
    check_extents("patch_size", patch)
    shape = _as_integers(raw_latent_shape)
    if not isinstance(shape, tuple) or len(shape) != len(patch):
        raise LayoutError(
            "latents and patch have different numbers of axes",
            got=f"raw_latent_shape {raw_latent_shape}, patch_size {patch_size}",
            expected="one patch side per axis, batch and channels left out",
            next_step="pass raw_latent_shape=latents.shape[2:]",
        )
    check_extents("raw_latent_shape", shape)
    grid = tuple(extent // side for extent, side in zip(shape, patch, strict=True))
    check_extents("the grid of the latents", grid)
    return grid


def tile_order(
    raw_latent_shape: Sequence[int],
    patch_size: Sequence[int],
    *,
    tile_thw: Sequence[int] = (4, 4, 4),
) -> TileOrder:
    """Return the tile order that FastVideo's metadata builder makes for latents of a shape.

    Args:
        raw_latent_shape: Latent extents (T, H, W) before patching.
        patch_size: Latents per token along each axis; what does not fill a patch is dropped.
        tile_thw: Tokens per axis of one tile.

    Raises:
        LayoutError: if shape, patch and tile differ in their number of axes, or a patch does not
            fit.
    """
    # The tile order is built on this module, so it cannot be imported at the top.
    from compiled_sparse.tile_order import TileOrder

    return TileOrder.of_grid(latent_grid(raw_latent_shape, patch_size), tile_thw)


def sequence_grid(grid: Sequence[Any], text_before: Any = 0, text_after: Any = 0) -> tuple[Any]:
    """Return the grid of one axis that a whole sequence is, text included; sizes may be symbolic.

    Args:
        grid: Tokens per axis of the video.
        text_before: Text tokens in front of it.
        text_after: Text tokens behind it.
    """
    return (math.prod(grid) + text_before + text_after,)


def check_text(text: object) -> None:
    """Check that what was given as text is a `Text`, or None.

    Raises:
        LayoutError: if it is not.
    """
    if not isinstance(text, Text | None):
        raise LayoutError(
            "text is not a Text",
            got=repr(text),
            expected="Text(before=..., after=...) or None",
            next_step="pass text=cs.Text(after=<number of text tokens>)",
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def auto_tile(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Choose the tile that wastes the fewest slots on `grid`.

    Among tiles of 128 to 512 tokens whose longest side is at most three times the shortest, the
    least padding wins, then the volume nearest 384, then the most cube-like shape, then the
    smallest sides: a fixed order, so the same grid always gives the same tile. A side counts only
    if no shorter one needs as few tiles, and with two or three axes only up to 32. A grid of fewer
    tokens is one tile; where a grid is too narrow for all this, a long tile is taken, then a small
    one.

    Args:
        grid: Tokens per axis, one to three axes.

    Returns:
        The tile's sides, one per axis.

    Raises:
        LayoutError: if `grid` is not one to three positive integers.
    """
    return _best_tile(grid)


# Dynamo runs the search instead of tracing it. This is what torch.compiler.assume_constant_result
# sets; calling that here would import Dynamo with the package.
auto_tile._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _best_tile(grid: tuple[int, ...]) -> tuple[int, ...]:
    check_extents("grid", grid)
    low = min(_AUTO_TILE_RANGE[0], math.prod(grid))
    max_side = _AUTO_TILE_MAX_SIDE if len(grid) > 1 else _AUTO_TILE_RANGE[1]
    sides = [_useful_sides(extent, max_side) for extent in grid]
    candidates = [
        tile for tile in itertools.product(*sides) if low <= math.prod(tile) <= _AUTO_TILE_RANGE[1]
    ]
    compact = [tile for tile in candidates if _imbalance(grid, tile) <= _AUTO_TILE_MAX_IMBALANCE]
    whole = tuple(min(extent, max_side) for extent in grid)
    return min(compact or candidates or [whole], key=lambda tile: _tile_cost(grid, tile))


def _imbalance(grid: tuple[int, ...], tile: tuple[int, ...]) -> float:
    """Longest over shortest side; an axis of one token leaves no choice and does not count."""
    sides = [side for extent, side in zip(grid, tile, strict=True) if extent > 1]
    return max(sides) / min(sides) if sides else 1.0


def _useful_sides(extent: int, limit: int) -> list[int]:
    """Sides that are the smallest for their number of tiles: the others only add padding."""
    counts = {-(-extent // side) for side in range(1, min(extent, limit) + 1)}
    return sorted({-(-extent // count) for count in counts})


def _tile_cost(grid: tuple[int, ...], tile: tuple[int, ...]) -> tuple[float, ...]:
    layout = BlockLayout(grid, tile)
    return (
        round(layout.padding_ratio, 6),
        abs(math.log2(layout.block_size / AUTO_TILE_VOLUME)),
        _imbalance(grid, tile),
        *tile,
    )
