"""From tokens to tiles and back: means of tiles, and a tile's value for each of its tokens.

Where they are traced both are ordinary operations, one axis after the other, which a compiler fuses
with what surrounds them; summed over all axes at once they are ten times slower there. Eagerly they
are the op `tile_mean` and its adjoint, which read everything once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import tiles_along
from compiled_sparse.ops.plan import tile_of_token
from compiled_sparse.ops.tensors import compute_dtype
from compiled_sparse.ops.tile_mean import tile_mean

_FIRST_AXIS = 2


def is_traced(tensor: Tensor) -> bool:
    """Whether operations on a tensor are recorded, not only computed."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return type(tensor) not in (Tensor, torch.nn.Parameter) or get_proxy_mode() is not None


def sizes_of_tiles(grid: Sequence[Any], tile: Sequence[int], device: torch.device) -> Tensor:
    """Return the number of tokens of each tile, float64 [tiles]."""
    sizes = torch.ones((), dtype=torch.float64, device=device)
    for extent, side in zip(grid, tile, strict=True):
        starts = torch.arange(0, extent, side, device=device)
        sizes = sizes[..., None] * (extent - starts).clamp(max=side)
    return sizes.flatten()


def means_of_tiles(x: Tensor, grid: Sequence[Any], tile: Sequence[int]) -> Tensor:
    """Mean over the tokens of each tile, summed and divided in float32 (float64 for float64).

    Args:
        x: [batch, heads, tokens of the grid, channels] in raster order.
        grid: Tokens per axis.
        tile: Tile sides.

    Returns:
        [batch, heads, tiles, channels] of x's dtype.
    """
    if not is_traced(x):
        return tile_mean(x, grid=grid, tile=tile)
    sums = sums_of_tiles(x.to(compute_dtype(x)), grid, tile)
    sizes = sizes_of_tiles(grid, tile, x.device).to(sums.dtype)
    return (sums / sizes[:, None]).to(x.dtype)


def sums_of_tiles(x: Tensor, grid: Sequence[Any], tile: Sequence[int]) -> Tensor:
    """Sum over the tokens of each tile, axis by axis; arguments as in `means_of_tiles`."""
    tiles = tiles_along(grid, tile)
    x = x.unflatten(_FIRST_AXIS, tuple(grid))
    for axis in reversed(range(len(grid))):
        dim = _FIRST_AXIS + axis
        x = _resized(x, dim, tiles[axis] * tile[axis] - grid[axis])
        x = x.unflatten(dim, (tiles[axis], tile[axis])).sum(dim + 1)
    return x.flatten(_FIRST_AXIS, -2)


def _resized(x: Tensor, dim: int, change: Any) -> Tensor:
    """Lengthen an axis by zeros, or shorten it where the change is negative.

    `narrow` is faster; where sizes are symbolic a compiler would ask whether it left anything out,
    and compile once for either answer.
    """
    if statically_known_true(change == 0):
        return x
    if isinstance(change, int) and change < 0:
        return x.narrow(dim, 0, x.shape[dim] + change)
    resized: Tensor = F.pad(x, (*(0, 0) * (x.dim() - dim - 1), 0, change))
    return resized


def spread_over_tokens(pooled: Tensor, grid: Sequence[Any], tile: Sequence[int]) -> Tensor:
    """Give every token the value of its tile; the adjoint of a sum over tiles.

    Args:
        pooled: [batch, heads, tiles, channels].
        grid: Tokens per axis.
        tile: Tile sides.

    Returns:
        [batch, heads, tokens of the grid, channels] in raster order.
    """
    if not is_traced(pooled):
        layout = BlockLayout(tuple(grid), tuple(tile))
        spread: Tensor = _Spread.apply(pooled, layout)  # type: ignore[no-untyped-call]
        return spread
    tiles = tiles_along(grid, tile)
    # In the dtype of sums for the backward, which adds up axis by axis.
    x: Tensor = pooled.to(compute_dtype(pooled)).unflatten(_FIRST_AXIS, tiles)
    for axis, (extent, side) in enumerate(zip(grid, tile, strict=True)):
        dim = _FIRST_AXIS + axis
        x = x.unsqueeze(dim + 1)
        x = x.expand(*(side if i == dim + 1 else -1 for i in range(x.dim())))
        x = _resized(x.flatten(dim, dim + 1), dim, extent - tiles[axis] * side)
    return x.flatten(_FIRST_AXIS, -2).to(pooled.dtype)


class _Spread(torch.autograd.Function):
    """A copy of rows, whose gradient is `tile_mean` times the tiles' sizes."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, layout: BlockLayout) -> Tensor:
        ctx.layout = layout
        index = tile_of_token(layout, pooled.device)
        # Heads beside each other in memory, as attention's output has them: long rows to copy.
        return pooled.transpose(1, 2).index_select(1, index).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grid, tile = ctx.layout.grid, ctx.layout.tile
        means = tile_mean(grad, grid=grid, tile=tile)
        compute = compute_dtype(means)
        sizes = sizes_of_tiles(grid, tile, grad.device).to(compute)
        return (means.to(compute) * sizes[:, None]).to(means.dtype), None
