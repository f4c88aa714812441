"""Where the tokens of a block lie in a sequence in raster order, computed on the device.

A block is a run of text before the grid, a tile of the grid, or a run of text behind it
(`compiled_sparse.layout`). Slots of a tile are numbered in raster order within the tile, so those
of a partial tile have holes, unlike in `ops.plan.block_tokens`: the tokens are the same.

Everywhere `grid` is (T, H, W), `text` the number of text tokens (before, behind) and `TILE` the
sides of a tile; grids of one or two axes have leading ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_origin(block, grid, text, TILE: tl.constexpr, HAS_TEXT: tl.constexpr):
    """Return (t, h, w, first, length) of a block; a few scalar instructions.

    A tile begins at grid position (t, h, w); `first` is then the token of position (0, 0, 0) and
    `length` -1. A run of text begins at token `first` and has `length` tokens.
    """
    SIZE: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    T, H, W = grid
    tiles_h = tl.cdiv(H, TILE[1])
    tiles_w = tl.cdiv(W, TILE[2])
    tile = block
    first = 0
    length = -1
    if HAS_TEXT:
        before, behind = text
        tile = block - tl.cdiv(before, SIZE)
        run = tile - tl.cdiv(T, TILE[0]) * tiles_h * tiles_w
        first = tl.where(tile < 0, block * SIZE, before)
        first = tl.where(run >= 0, before + T * H * W + run * SIZE, first)
        length = tl.where(tile < 0, before - block * SIZE, -1)
        length = tl.where(run >= 0, behind - run * SIZE, length)
    t = tile // (tiles_h * tiles_w) * TILE[0]
    h = tile // tiles_w % tiles_h * TILE[1]
    w = tile % tiles_w * TILE[2]
    return t, h, w, first, length


@triton.jit
def slot_tokens(origin, slot, grid, TILE: tl.constexpr, HAS_TEXT: tl.constexpr):
    """Return the token in every slot, and which slots hold one.

    `origin` is what `block_origin` returns, or one of them per slot; `slot` may go past the block.
    """
    t, h, w, first, length = origin
    T, H, W = grid
    t = t + slot // (TILE[1] * TILE[2])
    h = h + slot // TILE[2] % TILE[1]
    w = w + slot % TILE[2]
    token = first + (t * H + h) * W + w
    valid = (t < T) & (h < H) & (w < W)
    if HAS_TEXT:
        token = tl.where(length >= 0, first + slot, token)
        valid = tl.where(length >= 0, slot < length, valid)
    return token, valid & (slot < TILE[0] * TILE[1] * TILE[2])


@triton.jit
def block_tokens(block, slot, grid, text, TILE: tl.constexpr, HAS_TEXT: tl.constexpr):
    """Return the token in every slot of one block, and which slots hold one."""
    origin = block_origin(block, grid, text, TILE, HAS_TEXT)
    return slot_tokens(origin, slot, grid, TILE, HAS_TEXT)


@triton.jit
def step_tokens(
    entries,
    step,
    count,
    slot,
    grid,
    text,
    TILE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Return the tokens of one step along a list of blocks, and which slots hold one.

    A step takes `SLOTS` slots: one of the `CHUNKS` parts of a block, or two whole blocks where they
    are joined, the last one alone where the list is odd. `slot` is `arange(0, SLOTS)`.
    """
    if not JOINED:
        block = tl.load(entries + step // CHUNKS)
        return block_tokens(block, step % CHUNKS * SLOTS + slot, grid, text, TILE, HAS_TEXT)
    is_first = slot < SLOTS // 2
    has_second = 2 * step + 1 < count
    one = block_origin(tl.load(entries + 2 * step), grid, text, TILE, HAS_TEXT)
    second = tl.load(entries + 2 * step + 1, mask=has_second, other=0)
    two = block_origin(second, grid, text, TILE, HAS_TEXT)
    origin = (
        tl.where(is_first, one[0], two[0]),
        tl.where(is_first, one[1], two[1]),
        tl.where(is_first, one[2], two[2]),
        tl.where(is_first, one[3], two[3]),
        tl.where(is_first, one[4], two[4]),
    )
    token, valid = slot_tokens(origin, slot % (SLOTS // 2), grid, TILE, HAS_TEXT)
    return token, valid & (is_first | has_second)


@triton.jit
def number_of_steps(count, CHUNKS: tl.constexpr, JOINED: tl.constexpr):
    """Return how many steps `step_tokens` takes along a list of `count` blocks."""
    return tl.cdiv(count, 2) if JOINED else count * CHUNKS
