"""The order in which FastVideo lays out tokens for its tiled kernels, as tuples of integers.

There, tokens are permuted tile by tile and every tile is padded to full size, its tokens in front.
Nothing in this package permutes tokens; this is for code that has to read or write that order.
Nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import as_grid
from compiled_sparse.sparsity import num_selected


@dataclass(frozen=True)
class TileOrder:
    """The tokens of a grid, tile by tile.

    Tiles are numbered in raster order of tiles and tokens in raster order of the grid; those of one
    tile follow each other in that order, also where the tile is partial. L is the number of tokens,
    n that of tiles. For x [batch, L, heads, head_dim] and the indices as tensors:

        buffer = x.new_zeros(batch, n * max_block_size, heads, head_dim)
        buffer[:, non_pad_index] = x[:, tile_partition_indices]  # tile
        x = buffer[:, untile_combined_index]  # untile

    Args:
        grid_thw: Tokens per axis, one to three axes, slowest first.
        tile_thw: Tokens per axis of one tile; the same number of axes.

    Raises:
        LayoutError: if an extent is not positive, or grid and tile differ in their number of axes.
    """

    grid_thw: tuple[int, ...]
    tile_thw: tuple[int, ...]

    def __post_init__(self) -> None:
        BlockLayout(self.grid_thw, self.tile_thw)

    @classmethod
    def of_grid(cls, grid_thw: Sequence[int], tile_thw: Sequence[int]) -> TileOrder:
        """Return the order of a token grid, from sequences of integers of any kind.

        Args:
            grid_thw: Tokens per axis, after patching.
            tile_thw: Tokens per axis of one tile.

        Raises:
            LayoutError: if one of them is no grid, or they differ in their number of axes.
        """
        return cls(as_grid(grid_thw), as_grid(tile_thw))

    @property
    def num_tiles(self) -> tuple[int, ...]:
        """Number of tiles along each axis, partial ones included; see `total_num_tiles`."""
        return self.layout.tiles_per_axis

    @property
    def total_num_tiles(self) -> int:
        """Number of tiles n: the product of `num_tiles`."""
        return self.layout.num_blocks

    @property
    def total_seq_length(self) -> int:
        """Number of tokens L, without padding."""
        return self.layout.num_tokens

    @property
    def max_block_size(self) -> int:
        """Slots of one tile in the padded order: the tile's volume, also if no tile is full."""
        return self.layout.block_size

    @cached_property
    def tile_partition_indices(self) -> tuple[int, ...]:
        """Indices of the tokens, tile by tile; length L, no padding."""
        tokens: list[int] = []
        for tile in itertools.product(*self._offsets()):
            tokens += map(sum, itertools.product(*tile))
        return tuple(tokens)

    @cached_property
    def reverse_tile_partition_indices(self) -> tuple[int, ...]:
        """Where in `tile_partition_indices` each token stands; length L."""
        indices = self.tile_partition_indices
        return tuple(sorted(range(len(indices)), key=indices.__getitem__))

    @property
    def variable_block_sizes(self) -> tuple[int, ...]:
        """Tokens of each tile; length n."""
        return self.layout.block_sizes

    @cached_property
    def non_pad_index(self) -> tuple[int, ...]:
        """Slots of the padded order that hold a token, the first ones of each tile; length L."""
        starts = range(0, self.total_num_tiles * self.max_block_size, self.max_block_size)
        pairs = zip(starts, self.variable_block_sizes, strict=True)
        return tuple(slot for start, size in pairs for slot in range(start, start + size))

    @cached_property
    def untile_combined_index(self) -> tuple[int, ...]:
        """Slot of each token in the padded order, by the token's place on the grid; length L."""
        slots = self.non_pad_index
        return tuple(slots[i] for i in self.reverse_tile_partition_indices)

    def top_k(self, sparsity: float) -> int:
        """Return how many tiles each tile attends to; see `compiled_sparse.sparsity.num_selected`.

        Args:
            sparsity: Fraction of the tiles to leave out.

        Raises:
            MetadataError: if the sparsity is not from 0 to 1.
        """
        return num_selected(self.total_num_tiles, sparsity)

    @cached_property
    def layout(self) -> BlockLayout:
        """The same grid and tile, as the rest of this package holds them."""
        return BlockLayout(self.grid_thw, self.tile_thw)

    def _offsets(self) -> list[list[range]]:
        """By axis and tile: how much each row of the tile adds to the index of a token."""
        offsets: list[list[range]] = []
        stride = 1
        for extent, side in zip(reversed(self.grid_thw), reversed(self.tile_thw), strict=True):
            starts = range(0, extent, side)
            tiles = [(start, min(start + side, extent)) for start in starts]
            offsets.insert(0, [range(a * stride, b * stride, stride) for a, b in tiles])
            stride *= extent
        return offsets
