"""Forward of quantised block-sparse attention: one program per chunk of a query block.

Scores are products of int8, exact in int32; weights and values are multiplied in eight or sixteen
bits. `kernels.quantize` writes what is read here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.addressing import block_tokens
from compiled_sparse.kernels.quantize import round_to
from compiled_sparse.kernels.tiles import LN_2
from compiled_sparse.kernels.tiles import UNSPECIALIZED
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import program_position
from compiled_sparse.kernels.tiles import store_rows
from compiled_sparse.kernels.tiles import visible_keys


@triton.jit
def _attend(q_codes, k_codes, v_columns, valid, state, factor, FULL: tl.constexpr, PEAK):
    """Take more keys into the running softmax `state`: largest score, total weight, values.

    Scores are the integer products times a positive `factor`, in base 2.
    """
    top, total, values = state
    scores = tl.dot(q_codes, tl.trans(k_codes), out_dtype=tl.int32).to(tl.float32)
    if not FULL:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen no key yet: any finite number keeps -inf - -inf out.
    shift = new_top if FULL else tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    rounded = round_to(weights * PEAK, v_columns.dtype)
    # Added outside of the product: inside, chips before sm_100 sum float8 in fewer bits.
    product = tl.dot(rounded, tl.trans(v_columns), out_dtype=tl.float32)
    return new_top, total, values * shrink[:, None] + product


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_quantized(
    q_codes,
    k_codes,
    v_rounded,
    q_scales,
    k_scales,
    v_scales,
    out,
    lse,
    indices,
    counts,
    order,
    key_mask,
    out_strides,
    index_batch,
    index_head,
    index_row,
    order_batch,
    order_head,
    k_blocks,
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
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    K_FULL: tl.constexpr,
    WIDE: tl.constexpr,
    PEAK: tl.constexpr,
):
    """Write `out` and the natural log-sum-exp of one chunk of a query block.

    On entry `lse` holds what the mean key adds to the scores of each query. Codes are [batch,
    heads, blocks, chunks, rows, HEAD_DIM], rounded values the same with the last two transposed.
    """
    text = (before, behind)
    batch, head, row, chunk = program_position(
        order, rows, heads, (order_batch, order_head), Q_CHUNKS
    )
    q_block = ((batch * heads + head) * rows + row).to(tl.int64)
    column = tl.arange(0, HEAD_DIM)
    q_slot = tl.arange(0, BLOCK_M)
    k_slot = tl.arange(0, BLOCK_N)
    q_codes += (q_block * Q_CHUNKS + chunk) * (BLOCK_M * HEAD_DIM)
    queries = tl.load(q_codes + q_slot[:, None] * HEAD_DIM + column[None, :])
    q_scale = tl.load(q_scales + q_block)

    k_head = batch * (heads // groups) + head // groups
    k_first = k_head.to(tl.int64) * k_blocks
    k_places = k_codes + k_slot[:, None] * HEAD_DIM + column[None, :]
    v_places = v_rounded + column[:, None] * BLOCK_N + k_slot[None, :]
    entries = (
        head_base(indices, (index_batch, index_head), batch, head) + row.to(tl.int64) * index_row
    )
    count = tl.load(head_base(counts, (order_batch, order_head), batch, head) + row)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for step in range(count * K_CHUNKS):
        block = tl.load(entries + step // K_CHUNKS)
        k_chunk = step % K_CHUNKS
        offset = ((k_first + block) * K_CHUNKS + k_chunk) * (BLOCK_N * HEAD_DIM)
        keys = tl.load(k_places + offset)
        v_columns = tl.load(v_places + offset)
        factor = q_scale * tl.load(k_scales + k_first + block)
        factor = tl.where(factor < 1e-37, 1e-37, factor)  # at 0, -inf would become NaN
        k_token, valid = block_tokens(
            block, k_chunk * BLOCK_N + k_slot, (k_t, k_h, k_w), text, K_TILE, HAS_TEXT
        )
        if HAS_MASK:
            valid = visible_keys(key_mask, batch, k_length, k_token, valid)
        top, total, values = _attend(
            queries, keys, v_columns, valid, (top, total, values), factor, K_FULL, PEAK
        )

    seen = total != 0.0  # NaN is seen, and handed on
    total = tl.where(seen, total, 1.0)
    v_scale = tl.load(v_scales + k_head.to(tl.int64) * HEAD_DIM + column)
    values = values / (total * PEAK)[:, None] * v_scale[None, :]
    q_token, q_valid = block_tokens(
        row, chunk * BLOCK_M + q_slot, (q_t, q_h, q_w), text, Q_TILE, HAS_TEXT
    )
    out_base = head_base(out, out_strides, batch, head)
    store_rows(values, out_base, q_token, q_valid, out_strides[2], HEAD_DIM, HEAD_DIM, WIDE)
    lse_places = lse + (batch * heads + head).to(tl.int64) * q_length + q_token
    log_sum = (top + tl.log2(total)) * LN_2 + tl.load(lse_places, mask=q_valid, other=0.0)
    tl.store(lse_places, tl.where(seen, log_sum, float("-inf")), mask=q_valid)
