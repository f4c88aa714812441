"""Where the tokens of a chunk lie, for chunks whose sides are known when a kernel runs only.

A chunk is a run of text before the grid, a tile of the grid, or a run of text behind it, like the
blocks of `kernels.addressing`. Its sides are cut off at the border of the grid, so that its slots
have no holes, and a new tile compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK_SIZES = [
    *("scale", "words", "segment", "chunks", "parts", "heads", "groups", "q_length"),
    *("before", "behind", "grid_t", "grid_h", "grid_w", "tile_t", "tile_h", "tile_w"),
]
"""Kernel arguments whose values must not make another variant: a new grid compiles nothing."""


@triton.jit
def chunk_box(chunk, grid, tile, text):
    """Return (first token, height, width, tokens) of a chunk; a run of text is one row.

    `grid` and `tile` are (t, h, w), `text` the number of text tokens (before, behind).
    """
    T, H, W = grid
    tile_t, tile_h, tile_w = tile
    before, behind = text
    volume = tile_t * tile_h * tile_w
    tiles_h = tl.cdiv(H, tile_h)
    tiles_w = tl.cdiv(W, tile_w)
    place = chunk - tl.cdiv(before, volume)
    run = place - tl.cdiv(T, tile_t) * tiles_h * tiles_w
    t = place // (tiles_h * tiles_w) * tile_t
    h = place // tiles_w % tiles_h * tile_h
    w = place % tiles_w * tile_w
    height = tl.minimum(tile_h, H - h)
    width = tl.minimum(tile_w, W - w)
    size = tl.minimum(tile_t, T - t) * height * width
    first = before + (t * H + h) * W + w
    if (place < 0) | (run >= 0):
        first = tl.where(place < 0, chunk * volume, before + T * H * W + run * volume)
        size = tl.where(place < 0, before - chunk * volume, behind - run * volume)
        size = tl.minimum(size, volume)
        height = 1
        width = size
    return first, height, width, size


@triton.jit
def reciprocal(divisor):
    """Return what `divided` needs of a positive scalar divisor."""
    return (0xFFFFFFFF // divisor.to(tl.int64)).to(tl.uint32)


@triton.jit
def divided(number, divisor, inverse):
    """Return quotients and remainders of int32 numbers >= 0, exactly and without a division."""
    quotient = ((number.to(tl.uint64) * inverse.to(tl.uint64)) >> 32).to(tl.int32)
    remainder = number - quotient * divisor
    short = remainder >= divisor  # the reciprocal was rounded down: one too few at most
    quotient = tl.where(short, quotient + 1, quotient)
    return quotient, tl.where(short, remainder - divisor, remainder)


@triton.jit
def box_tokens(box, slot, grid):
    """Return the tokens in slots of a chunk; those past its size are no tokens of it."""
    first, height, width, _ = box
    row, w = divided(slot, width, reciprocal(width))
    t, h = divided(row, height, reciprocal(height))
    return first + (t * grid[1] + h) * grid[2] + w
