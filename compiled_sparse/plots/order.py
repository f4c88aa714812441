"""The tile order as numbers: of each token its tile, and its place in the list."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compiled_sparse.layout import three_axes
from compiled_sparse.plots.pattern import checked_size
from compiled_sparse.plots.words import times
from compiled_sparse.tile_order import TileOrder


@dataclass(frozen=True, kw_only=True)
class OrderMap:
    """A tile order, laid out on its grid.

    Args:
        order: The order.
        tiles: int64, shaped like the grid with leading ones, [T, H, W]: number of a token's tile.
        places: int64, likewise: place of a token in the list of tokens, tile by tile.
    """

    order: TileOrder
    tiles: Tensor
    places: Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid with leading ones."""
        return three_axes(self.order.grid_thw)

    @property
    def tile(self) -> tuple[int, int, int]:
        """Sides of a full tile with leading ones."""
        return three_axes(self.order.tile_thw)

    @property
    def partial_tiles(self) -> tuple[int, ...]:
        """Numbers of the tiles that the border cuts off."""
        full = self.order.max_block_size
        sizes = self.order.variable_block_sizes
        return tuple(number for number, size in enumerate(sizes) if size < full)

    @property
    def title(self) -> str:
        """What the picture shows, in words."""
        order = self.order
        slots = order.total_num_tiles * order.max_block_size
        return (
            f"Tile order, tiles of {times(order.tile_thw)} tokens on grid {times(order.grid_thw)}: "
            f"{order.total_num_tiles:,} tiles, {len(self.partial_tiles):,} of them partial; "
            f"{order.total_seq_length:,} tokens in {slots:,} slots"
        )


def order_map(grid_thw: tuple[int, ...], tile_thw: tuple[int, ...]) -> OrderMap:
    """Return the tile order of a grid.

    Args:
        grid_thw: Token grid after patching, one to three axes.
        tile_thw: Tokens per axis of one tile; the same number of axes.

    Raises:
        LayoutError: if grid and tile do not fit, or there are too many tiles to draw.
    """
    order = TileOrder.of_grid(grid_thw, tile_thw)
    checked_size(order.layout)
    places = torch.tensor(order.reverse_tile_partition_indices)
    sizes = torch.tensor(order.variable_block_sizes)
    tiles = torch.arange(order.total_num_tiles).repeat_interleave(sizes)[places]
    shape = three_axes(order.grid_thw)
    return OrderMap(order=order, tiles=tiles.view(shape), places=places.view(shape))
