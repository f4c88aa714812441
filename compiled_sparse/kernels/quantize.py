"""Quantisers: tokens gathered from where they lie, written block by block in slot order.

Slots of a block are those of `kernels.addressing`, cut into CHUNKS runs of ROWS. What is written is
contiguous, so that the attention kernel reads whole tiles without an address per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.addressing import block_tokens
from compiled_sparse.kernels.tiles import INTERPRETED
from compiled_sparse.kernels.tiles import LOG2_E
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows
from compiled_sparse.kernels.tiles import visible_keys

LEVELS = tl.constexpr(127.0)
SMALLEST_SCALE = tl.constexpr(1e-7)

UNSPECIALIZED = ["scale", "blocks", "heads", "groups", "length", "t", "h", "w", "before", "behind"]


@triton.jit
def _tokens(block, chunk, grid, text, TILE: tl.constexpr, HAS_TEXT: tl.constexpr, ROWS):
    return block_tokens(block, chunk * ROWS + tl.arange(0, ROWS), grid, text, TILE, HAS_TEXT)


@triton.jit
def _round_away(x):
    """Round to the nearest integer, halves away from zero; NaN gives 0."""
    x = tl.where(x == x, x, 0.0)
    return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to the nearest number of a smaller dtype."""
    if INTERPRETED and dtype == tl.float8e4nv:  # the interpreter's own cast cuts digits off
        exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
        unit = tl.maximum(exponent, 0x3C800000).to(tl.float32, bitcast=True)  # 2^-6: denormal below
        x = (x + unit * 1572864.0) - unit * 1572864.0  # 1.5 * 2^20: three binary digits are left
    return x.to(dtype)


@triton.jit
def _scale_of(largest, nans):
    """Return the scale of a block; NaN, which a maximum passes over, is handed on."""
    return tl.where(nans > 0, float("nan"), largest / LEVELS + SMALLEST_SCALE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_queries(
    x,
    mean,
    codes,
    scales,
    shares,
    strides,
    scale,
    blocks,
    heads,
    groups,
    length,
    t,
    h,
    w,
    before,
    behind,
    TILE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write one query block as int8, and its scale, into which the softmax's is multiplied.

    The sign of the softmax scale goes into the integers. `shares` [batch, heads, length] gets what
    the mean key [batch, key heads, HEAD_DIM] adds to the scores of each query.
    """
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % heads
    batch = program // blocks // heads
    base = head_base(x, strides, batch, head)
    column = tl.arange(0, HEAD_DIM)
    mean_head = batch * (heads // groups) + head // groups
    mean_key = tl.load(mean + mean_head.to(tl.int64) * HEAD_DIM + column).to(tl.float32)
    shares += (batch * heads + head).to(tl.int64) * length
    largest = 0.0
    nans = 0
    for chunk in range(CHUNKS):
        token, valid = _tokens(block, chunk, (t, h, w), (before, behind), TILE, HAS_TEXT, ROWS)
        rows = load_rows(base, token, valid, strides[2], HEAD_DIM, HEAD_DIM, WIDE).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(rows), 1), 0))
        nans += tl.sum(tl.sum((rows != rows).to(tl.int32), 1), 0)
        tl.store(shares + token, tl.sum(rows * mean_key[None, :], 1) * scale, mask=valid)
    block_scale = _scale_of(largest, nans)
    place = codes + program.to(tl.int64) * (CHUNKS * ROWS * HEAD_DIM)
    for chunk in range(CHUNKS):
        slot = chunk * ROWS + tl.arange(0, ROWS)
        token, valid = _tokens(block, chunk, (t, h, w), (before, behind), TILE, HAS_TEXT, ROWS)
        rows = load_rows(base, token, valid, strides[2], HEAD_DIM, HEAD_DIM, WIDE).to(tl.float32)
        rounded = _round_away(rows / block_scale)
        rounded = tl.where(scale < 0, -rounded, rounded).to(tl.int8)
        tl.store(place + slot[:, None] * HEAD_DIM + column[None, :], rounded)
    tl.store(scales + program, block_scale * (tl.abs(scale) * LOG2_E))


@triton.jit
def _smooth_keys(base, token, valid, stride, mean_key, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr):
    """Load keys and subtract their mean, rounded to their dtype; zero where not valid."""
    rows = load_rows(base, token, valid, stride, HEAD_DIM, HEAD_DIM, WIDE)
    smooth = (rows.to(tl.float32) - mean_key[None, :]).to(rows.dtype).to(tl.float32)
    return tl.where(valid[:, None], smooth, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_keys(
    x,
    mean,
    key_mask,
    codes,
    scales,
    strides,
    blocks,
    heads,
    length,
    t,
    h,
    w,
    before,
    behind,
    TILE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write one key block less the mean key as int8, and its scale; hidden keys are zero."""
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % heads
    batch = program // blocks // heads
    base = head_base(x, strides, batch, head)
    column = tl.arange(0, HEAD_DIM)
    mean_key = tl.load(mean + (program // blocks).to(tl.int64) * HEAD_DIM + column).to(tl.float32)
    largest = 0.0
    nans = 0
    for chunk in range(CHUNKS):
        token, valid = _tokens(block, chunk, (t, h, w), (before, behind), TILE, HAS_TEXT, ROWS)
        if HAS_MASK:
            valid = visible_keys(key_mask, batch, length, token, valid)
        rows = _smooth_keys(base, token, valid, strides[2], mean_key, HEAD_DIM, WIDE)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(rows), 1), 0))
        nans += tl.sum(tl.sum((rows != rows).to(tl.int32), 1), 0)
    block_scale = _scale_of(largest, nans)
    place = codes + program.to(tl.int64) * (CHUNKS * ROWS * HEAD_DIM)
    for chunk in range(CHUNKS):
        slot = chunk * ROWS + tl.arange(0, ROWS)
        token, valid = _tokens(block, chunk, (t, h, w), (before, behind), TILE, HAS_TEXT, ROWS)
        if HAS_MASK:
            valid = visible_keys(key_mask, batch, length, token, valid)
        rows = _smooth_keys(base, token, valid, strides[2], mean_key, HEAD_DIM, WIDE)
        rounded = _round_away(rows / block_scale).to(tl.int8)
        tl.store(place + slot[:, None] * HEAD_DIM + column[None, :], rounded)
    tl.store(scales + program, block_scale)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def round_values(
    x,
    multiplier,
    key_mask,
    rounded,
    strides,
    blocks,
    heads,
    length,
    t,
    h,
    w,
    before,
    behind,
    TILE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write one chunk of a block of values, times the multipliers of its channels, transposed.

    `rounded` is [batch, heads, blocks, CHUNKS, HEAD_DIM, ROWS]: matrix instructions for eight bits
    want the keys side by side. Hidden values are zero.
    """
    program = tl.program_id(0)
    chunk = program % CHUNKS
    block = program // CHUNKS % blocks
    head = program // CHUNKS // blocks % heads
    batch = program // CHUNKS // blocks // heads
    base = head_base(x, strides, batch, head)
    column = tl.arange(0, HEAD_DIM)
    token, valid = _tokens(block, chunk, (t, h, w), (before, behind), TILE, HAS_TEXT, ROWS)
    if HAS_MASK:
        valid = visible_keys(key_mask, batch, length, token, valid)
    rows = load_rows(base, token, valid, strides[2], HEAD_DIM, HEAD_DIM, WIDE).to(tl.float32)
    multipliers = multiplier + (batch * heads + head).to(tl.int64) * HEAD_DIM + column
    rows = rows * tl.load(multipliers)[None, :]
    columns = tl.trans(round_to(rows, rounded.dtype.element_ty))
    place = rounded + program.to(tl.int64) * (ROWS * HEAD_DIM)
    tl.store(place + column[:, None] * ROWS + tl.arange(0, ROWS)[None, :], columns)
