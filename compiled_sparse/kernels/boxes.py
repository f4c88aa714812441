"""Forward that lets the bulk copy engine fetch tiles: keys and values come as boxes of the grid.

For chips with that engine (sm_90 and later), tiles whose sides are powers of two and calls without
a key mask. Positions outside the grid read as zeros. Everything else is as in `forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.addressing import block_origin
from compiled_sparse.kernels.addressing import block_tokens
from compiled_sparse.kernels.addressing import slot_tokens
from compiled_sparse.kernels.forward import attend
from compiled_sparse.kernels.forward import finish
from compiled_sparse.kernels.forward import positive_factor
from compiled_sparse.kernels.tiles import UNSPECIALIZED
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows
from compiled_sparse.kernels.tiles import program_position
from compiled_sparse.kernels.tiles import store_rows


@triton.jit
def box_corner(origin, chunk, T, TILE: tl.constexpr, BOX: tl.constexpr):
    """Return the grid position of one box of a block; outside the grid where the block is text."""
    t, h, w, _first, length = origin
    across: tl.constexpr = TILE[2] // BOX[2]
    down: tl.constexpr = TILE[1] // BOX[1]
    t += chunk // (down * across) * BOX[0]
    return (
        tl.where(length >= 0, T, t),
        h + chunk // across % down * BOX[1],
        w + chunk % across * BOX[2],
    )


@triton.jit
def load_box(boxes, head, corner, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows [ROWS, BLOCK_D] of a box of a head; zeros outside the grid."""
    t, h, w = corner
    return tl.reshape(boxes.load([head, t, h, w, 0]), [ROWS, BLOCK_D])


@triton.jit
def is_listed(entries, count, block, SIZE: tl.constexpr):
    """Return whether a list of blocks contains `block`."""
    found = 0
    for start in range(0, count, SIZE):
        place = start + tl.arange(0, SIZE)
        entry = tl.load(entries + place, mask=place < count, other=-1)
        found = tl.maximum(found, tl.max((entry == block).to(tl.int32), 0))
    return found > 0


@triton.jit(
    do_not_specialize=[*UNSPECIALIZED, "batch", "text_blocks", "text_blocks_before", "k_tiles"]
)
def attention_forward_boxes(
    q,
    k,
    v,
    out,
    lse,
    indices,
    counts,
    order,
    k_boxes,
    v_boxes,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    index_batch,
    index_head,
    index_row,
    order_batch,
    order_head,
    batch,
    text_blocks,
    text_blocks_before,
    k_tiles,
    scale,
    rows,
    heads,
    groups,
    q_length,
    k_length,
    before,
    behind,
    q_t,
    q_h,
    q_w,
    k_t,
    k_h,
    k_w,
    SUM: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BOX: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    K_FULL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write `out` and the natural log-sum-exp of one chunk of a query block of one batch entry.

    `k_boxes` and `v_boxes` are descriptors [heads, T, H, W, D] of that entry's grid tokens. Blocks
    of text are masked on the way along the list and taken row by row afterwards.
    """
    text = (before, behind)
    k_grid = (k_t, k_h, k_w)
    _first, head, row, chunk = program_position(
        order, rows, heads, (order_batch, order_head), Q_CHUNKS
    )
    entry = head * 0 + batch
    slot = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    q_token, q_valid = block_tokens(row, slot, (q_t, q_h, q_w), text, Q_TILE, HAS_TEXT)
    q_base = head_base(q, q_strides, entry, head)
    q_rows = load_rows(q_base, q_token, q_valid, q_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    q_rows, factor = positive_factor(q_rows, scale, SUM)

    k_head = head // groups
    entries = (
        head_base(indices, (index_batch, index_head), entry, head) + row.to(tl.int64) * index_row
    )
    count = tl.load(head_base(counts, (order_batch, order_head), entry, head) + row)
    k_slot = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), SUM)
    total = tl.zeros([BLOCK_M], SUM)
    values = tl.zeros([BLOCK_M, BLOCK_D], SUM)
    for step in range(count * K_CHUNKS):
        block = tl.load(entries + step // K_CHUNKS)
        origin = block_origin(block, k_grid, text, K_TILE, HAS_TEXT)
        corner = box_corner(origin, step % K_CHUNKS, k_t, K_TILE, BOX)
        k_rows = load_box(k_boxes, k_head, corner, BLOCK_N, BLOCK_D)
        v_rows = load_box(v_boxes, k_head, corner, BLOCK_N, BLOCK_D)
        place = (corner[0], corner[1], corner[2], 0, -1)
        k_token, k_valid = slot_tokens(place, k_slot, k_grid, BOX, False)
        top, total, values = attend(
            q_rows, k_rows, v_rows, k_valid, (top, total, values), factor, K_FULL, PRECISION
        )
    if HAS_TEXT:
        k_base = head_base(k, k_strides, entry, k_head)
        v_base = head_base(v, v_strides, entry, k_head)
        for step in range(text_blocks * K_CHUNKS):
            block = step // K_CHUNKS
            block += tl.where(block < text_blocks_before, 0, k_tiles)
            text_slot = step % K_CHUNKS * BLOCK_N + k_slot
            k_token, k_valid = block_tokens(block, text_slot, k_grid, text, K_TILE, HAS_TEXT)
            k_valid &= is_listed(entries, count, block, 128)
            k_rows = load_rows(k_base, k_token, k_valid, k_strides[2], HEAD_DIM, BLOCK_D, WIDE)
            v_rows = load_rows(v_base, k_token, k_valid, v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
            top, total, values = attend(
                q_rows, k_rows, v_rows, k_valid, (top, total, values), factor, False, PRECISION
            )

    out_base = head_base(out, out_strides, entry, head)
    lse_base = lse + (entry * heads + head).to(tl.int64) * q_length
    values, log_sum = finish(top, total, values)
    store_rows(values, out_base, q_token, q_valid, out_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    tl.store(lse_base + q_token, log_sum, mask=q_valid)
