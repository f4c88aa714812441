"""Means of the tokens of every block: what selectors compare blocks by.

The forward is an opaque op: as ordinary operations, partial tiles and text would become a padded
copy or a scatter on every device. Its backward is made of ordinary operations, which a compiler
fuses into whatever adds the gradient up; it is differentiable any number of times.

`torch.library.triton_op` would let Inductor see the Triton kernel. It gains nothing here: a kernel
that is seen is still launched by itself, and CPU tensors would still need this op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import ceil_div
from compiled_sparse.layout import three_axes
from compiled_sparse.layout import tiles_along
from compiled_sparse.ops.checks import check_dtype
from compiled_sparse.ops.checks import check_length
from compiled_sparse.ops.checks import check_rank
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.ops.routing import uses_gpu_kernels
from compiled_sparse.ops.tensors import compute_dtype

_NAME = "tile_mean"

LIBRARY.define(
    f"{_NAME}(Tensor x, SymInt[] grid, int[] tile, SymInt text_before, SymInt text_after) -> Tensor"
)


def tile_mean(
    x: Tensor,
    *,
    grid: Sequence[int],
    tile: Sequence[int],
    text_before: int = 0,
    text_after: int = 0,
) -> Tensor:
    """Mean over the tokens of every block, partial tiles and runs of text by their true size.

    Blocks are numbered: runs of text in front, tiles in raster order, runs of text behind; a run
    has as many slots as the tile. Sums and quotients are float32 (float64 for float64), rounded
    once to x's dtype. The order of the tokens is not changed and nothing is padded.

    Args:
        x: [batch, heads, length, head_dim] in raster order, any strides; float32, bfloat16, float16
            or float64.
        grid: Token grid, one to three axes, slowest first.
        tile: Tile sides, one per axis.
        text_before: Text tokens in front of the grid.
        text_after: Text tokens behind the grid.

    Returns:
        [batch, heads, blocks, head_dim] of x's dtype, contiguous; differentiable. The gradient of
        x lies over [batch, length, heads, head_dim] memory.

    Raises:
        ShapeError: if x has not four axes.
        DtypeError: if the dtype is not supported.
        LayoutError: if grid and text do not add up to the length.
    """
    op = torch.ops.compiled_sparse.tile_mean
    means: Tensor = op(x, list(grid), list(tile), text_before, text_after)
    return means


def _forward(
    x: Tensor, grid: list[int], tile: list[int], text_before: int, text_after: int
) -> Tensor:
    _check(x)
    layout = BlockLayout(tuple(grid), tuple(tile), text_before, text_after)
    check_length("x", x, layout)
    means = x.new_empty((*x.shape[:2], layout.num_blocks, x.shape[3]))
    if not means.numel():
        return means
    if x.stride(3) != 1:
        x = x.contiguous()
    if uses_gpu_kernels(x):
        from compiled_sparse.kernels import pooling

        sides = three_axes(layout.grid), three_axes(layout.tile)
        pooling.tile_mean(x, *sides, (text_before, text_after), layout.num_blocks, means)
    else:
        _cpu(x, layout, means)
    return means


def _check(x: Tensor) -> None:
    check_rank("x", x)
    check_dtype("x", x)


def _cpu(x: Tensor, layout: BlockLayout, means: Tensor) -> None:
    """Sum the rows of each block as a bag of embeddings: x is read once, and nothing is copied.

    Low precision is widened one head at a time, in memory that stays in the cache.
    """
    order, starts, sizes = _bags(layout)
    heads, head_dim = x.shape[1], x.shape[3]
    widened = None
    if x.dtype in (torch.float16, torch.bfloat16):
        widened = x.new_empty((x.shape[2], head_dim), dtype=torch.float32)
    elif x.stride(1) == head_dim and heads > 1:
        # The heads of a token lie side by side: a row is all of them.
        shape = (x.shape[0], 1, x.shape[2], heads * head_dim)
        x = x.as_strided(shape, (x.stride(0), 0, x.stride(2), 1))
        means = means.unflatten(1, (1, heads)).permute(0, 1, 3, 2, 4)
    for batch, head in ((b, h) for b in range(x.shape[0]) for h in range(x.shape[1])):
        rows = x[batch, head] if widened is None else widened.copy_(x[batch, head])
        sums = F.embedding_bag(order, rows, starts, mode="sum")
        target = means[batch, head]
        target.copy_((sums / sizes).view(target.shape))


@lru_cache(maxsize=64)
def _bags(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by block, where each block begins, and block sizes [blocks, 1]: int32."""
    tokens = block_tokens(layout)
    sizes = (tokens >= 0).sum(1, dtype=torch.int32)
    starts = sizes.cumsum(0, dtype=torch.int32) - sizes
    return tokens[tokens >= 0], starts, sizes[:, None]


def _fake(x: Tensor, grid: list[Any], tile: list[int], text_before: Any, text_after: Any) -> Tensor:
    _check(x)
    runs = sum(ceil_div(text, math.prod(tile)) for text in (text_before, text_after))
    return x.new_empty((*x.shape[:2], math.prod(tiles_along(grid, tile)) + runs, x.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grid, tile, before, after = ctx.geometry
    block_of_token, sizes = _blocks(grid, tile, before, after, grad.device)
    # Heads beside each other in memory: long rows to copy, and what attention's gradients have.
    shares = (grad.to(compute_dtype(grad)) / sizes[:, None]).to(grad.dtype).transpose(1, 2)
    return shares.index_select(1, block_of_token).transpose(1, 2), None, None, None, None


def _blocks(
    grid: Sequence[Any], tile: Sequence[int], before: Any, after: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the block of every token, and every block's size, int64; extents may be symbolic.

    Plain arithmetic on the device: it is fused where it is compiled, and waits for nothing.
    """
    size = math.prod(tile)
    index = torch.zeros((), dtype=torch.int64, device=device)
    sizes = torch.ones((), dtype=torch.int64, device=device)
    tiles = 1
    for extent, side in zip(grid, tile, strict=True):
        along = ceil_div(extent, side)
        index = index[..., None] * along + torch.arange(extent, device=device) // side
        sizes = sizes[..., None] * (extent - torch.arange(0, extent, side, device=device)).clamp(
            max=side
        )
        tiles = tiles * along
    first = ceil_div(before, size)
    texts = [torch.arange(text, device=device) // size for text in (before, after)]
    runs = [
        (text - torch.arange(0, text, size, device=device)).clamp(max=size)
        for text in (before, after)
    ]
    index = torch.cat([texts[0], index.flatten() + first, texts[1] + (first + tiles)])
    return index, torch.cat([runs[0], sizes.flatten(), runs[1]])


for _device in ("CPU", "CUDA"):
    LIBRARY.impl(_NAME, _forward, _device)
torch.library.register_fake(f"{NAMESPACE}::{_NAME}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::{_NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)
