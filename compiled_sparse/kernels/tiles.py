"""Pieces that every attention kernel is made of: programs, rows in and out, products."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

UNSPECIALIZED = [
    *("index_batch", "index_head", "index_row", "start_batch", "start_head"),
    *("order_batch", "order_head"),
    *("scale", "rows", "heads", "groups", "q_length", "k_length", "before", "behind"),
    *("q_t", "q_h", "q_w", "k_t", "k_h", "k_w"),
]
"""Kernel arguments whose values must not make another variant: a new grid compiles nothing."""


@triton.jit
def program_position(order, rows, heads, row_strides, CHUNKS: tl.constexpr):
    """Return batch entry, head, block and chunk of this program.

    The chunks of a block, then neighbouring blocks, then heads follow each other, so that programs
    that run together read the same rows from the cache. `order` lists the blocks of each head.
    """
    program = tl.program_id(0)
    chunk = program % CHUNKS
    place = program // CHUNKS % rows
    head = program // CHUNKS // rows % heads
    batch = program // CHUNKS // rows // heads
    row = tl.load(head_base(order, row_strides, batch, head) + place)
    return batch, head, row, chunk


@triton.jit
def head_base(tensor, strides, batch, head):
    """Return a pointer to where a head begins, computed in 64 bits."""
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def row_places(base, token, stride, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Return pointers [slots, BLOCK_D] to rows of a head; `WIDE` computes offsets in 64 bits."""
    if WIDE:
        token = token.to(tl.int64)
    return base + (token * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def inside(valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return which elements [slots, BLOCK_D] of valid rows exist."""
    exists = tl.broadcast_to(valid[:, None], [valid.shape[0], BLOCK_D])
    if HEAD_DIM < BLOCK_D:
        exists &= (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return exists


@triton.jit
def load_rows(
    base,
    token,
    valid,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Load rows [slots, BLOCK_D] of a head; invalid rows and columns past HEAD_DIM are zero."""
    places = row_places(base, token, stride, BLOCK_D, WIDE)
    return tl.load(places, mask=inside(valid, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_rows(
    rows,
    base,
    token,
    valid,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store rows [slots, BLOCK_D] of a head where `load_rows` would read them."""
    places = row_places(base, token, stride, BLOCK_D, WIDE)
    values = rows.to(base.dtype.element_ty)
    tl.store(places, values, mask=inside(valid, HEAD_DIM, BLOCK_D))


@triton.jit
def visible_keys(key_mask, batch, k_length, token, valid):
    """Return which of the valid keys a mask [batch, k_length] leaves visible."""
    mask = key_mask + batch.to(tl.int64) * k_length
    return tl.load(mask + token, mask=valid, other=0) != 0


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """Return `total` plus the matrix product of two tiles, `a` rounded to the dtype of `b`."""
    a = a.to(b.dtype)
    if INTERPRETED and b.dtype == tl.bfloat16:  # bit patterns would be multiplied as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
