"""Means of the tokens of every block, read where they lie."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled_sparse.kernels import launch
from compiled_sparse.kernels.addressing import block_tokens
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows

Sides = tuple[int, int, int]

_ELEMENTS = 8192
_ELEMENTS_PER_WARP = 2048
_MAX_WARPS = 4
_ADDRESS_LIMIT = 2**31
_UNSPECIALIZED = ["blocks", "heads", "t", "h", "w", "before", "behind"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def block_means(
    x,
    means,
    strides,
    blocks,
    heads,
    t,
    h,
    w,
    before,
    behind,
    TILE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    SUM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the mean row of one block of a head: `means` is [batch, heads, blocks, HEAD_DIM]."""
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % heads
    batch = program // blocks // heads
    base = head_base(x, strides, batch, head)
    total = tl.zeros([BLOCK_D], SUM)
    size = 0
    for start in range(0, TILE[0] * TILE[1] * TILE[2], SLOTS):
        slot = start + tl.arange(0, SLOTS)
        token, valid = block_tokens(block, slot, (t, h, w), (before, behind), TILE, HAS_TEXT)
        rows = load_rows(base, token, valid, strides[2], HEAD_DIM, BLOCK_D, WIDE)
        total += tl.sum(rows.to(SUM), 0)
        size += tl.sum(valid.to(tl.int32), 0)
    column = tl.arange(0, BLOCK_D)
    # Rounded once, as elsewhere, so that equal means are equal whatever they are means of.
    mean = tl.div_rn(total, 1.0 * size) if tl.float32 == SUM else total / size
    place = means + program.to(tl.int64) * HEAD_DIM + column
    tl.store(place, mean.to(means.dtype.element_ty), mask=column < HEAD_DIM)


def tile_mean(
    x: Tensor, grid: Sides, tile: Sides, text: tuple[int, int], blocks: int, means: Tensor
) -> None:
    """Write the mean of every block's tokens.

    Args:
        x: [batch, heads, length, head_dim], last stride 1.
        grid: Token grid (T, H, W); grids of fewer axes have leading ones.
        tile: Tile sides, like `grid`.
        text: Text tokens before and behind the grid.
        blocks: Number of blocks, text runs included.
        means: [batch, heads, blocks, head_dim] of x's dtype, contiguous.
    """
    batch, heads, length, head_dim = x.shape
    block_d = triton.next_power_of_2(head_dim)
    volume = triton.next_power_of_2(math.prod(tile))
    slots = min(volume, max(1, _ELEMENTS // block_d))
    constants = {
        "TILE": tile,
        "HAS_TEXT": sum(text) > 0,
        "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "HEAD_DIM": head_dim,
        "SLOTS": slots,
        "BLOCK_D": block_d,
        "WIDE": x.stride(2) * length >= _ADDRESS_LIMIT,
    }
    launch.run(
        block_means,
        batch * heads * blocks,
        (x, means, x.stride()[:3], blocks, heads, *grid, *text),
        constants,
        warps=max(1, min(_MAX_WARPS, slots * block_d // _ELEMENTS_PER_WARP)),
    )
