"""The configs a plan compares, chosen by the grid alone: none is tuned for quality."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Iterator

from compiled_sparse import registry
from compiled_sparse.config import STA
from compiled_sparse.config import SWBA
from compiled_sparse.config import Auto
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.layout import auto_tile
from compiled_sparse.layout import ceil_div
from compiled_sparse.layout import sequence_grid
from compiled_sparse.pattern import sta_density
from compiled_sparse.sparsity import ratio_at
from compiled_sparse.sparsity import truncated_top_k

SPARSITY = 0.9
"""What the mechanisms of a plan leave out, as nearly as the grid allows."""

_LEAST_WINDOW = 3  # a tile and its neighbours
_SMALL_TILE = (4, 4, 4)


def default_configs(grid: tuple[int, ...], text: Text) -> tuple[MechanismConfig, ...]:
    """Return one config of each mechanism at a sparsity of about 0.9, and automatic mode.

    Args:
        grid: Token grid.
        text: Text tokens around it.
    """
    configs = (_config_of(each.config, grid, text) for each in registry.mechanisms())
    return (Auto(), *configs)


def _config_of(
    config_class: type[MechanismConfig], grid: tuple[int, ...], text: Text
) -> MechanismConfig:
    if config_class.has_sparsity:
        return config_class().with_sparsity(SPARSITY)
    choose = _BY_SHAPE.get(config_class)
    return config_class() if choose is None else choose(grid, text)


def _sta(grid: tuple[int, ...], text: Text) -> STA:
    """Tile and window whose density comes nearest: the automatic tile, or one that leaves more."""
    tiles = [auto_tile(grid), *([_SMALL_TILE] if len(grid) == len(_SMALL_TILE) else [])]
    layouts = [BlockLayout(grid, tile, text.before, text.after) for tile in tiles]

    def distance(choice: tuple[BlockLayout, tuple[int, ...]]) -> float:
        layout, window = choice
        return abs(sta_density(layout, (window,)) - (1 - SPARSITY))

    choices = ((layout, window) for layout in layouts for window in _windows(layout))
    layout, window = min(choices, key=distance)
    return STA(window_thw=window, tile_thw=layout.tile)


def _windows(layout: BlockLayout) -> Iterator[tuple[int, ...]]:
    """Windows of a tile with its neighbours at least."""
    sides = (range(min(_LEAST_WINDOW, n), n + 1, 2) for n in layout.tiles_per_axis)
    return itertools.product(*sides)


def _swba(grid: tuple[int, ...], text: Text) -> SWBA:
    block = SWBA().block
    (length,) = sequence_grid(grid, text.before, text.after)
    return SWBA(block=block, window=truncated_top_k(ceil_div(length, block), ratio_at(SPARSITY)))


def _vmoba(grid: tuple[int, ...], text: Text) -> MechanismConfig:
    """Chunks in space and time in every layer, a fixed number of them."""
    sides = VMoBA().st_chunk_size
    if len(grid) != len(sides):
        return VMoBA()  # which says itself that it does not fit
    chunks = BlockLayout(grid, sides).num_video_blocks
    kept = truncated_top_k(chunks, ratio_at(SPARSITY))
    return VMoBA(temporal_layer=0, spatial_layer=0, moba_select_mode="topk", st_topk=max(2, kept))


_BY_SHAPE: dict[type[MechanismConfig], Callable[[tuple[int, ...], Text], MechanismConfig]] = {
    STA: _sta,
    SWBA: _swba,
    VMoBA: _vmoba,
}
