"""Forward of block-sparse attention: one program per chunk of a query block.

A program keeps its queries in registers and walks the list of its block with an online softmax in
base 2 (arXiv 2205.14135). Keys and values are read where they lie; no tensor is permuted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.addressing import block_tokens
from compiled_sparse.kernels.addressing import number_of_steps
from compiled_sparse.kernels.addressing import step_tokens
from compiled_sparse.kernels.tiles import LN_2
from compiled_sparse.kernels.tiles import LOG2_E
from compiled_sparse.kernels.tiles import UNSPECIALIZED
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows
from compiled_sparse.kernels.tiles import product
from compiled_sparse.kernels.tiles import program_position
from compiled_sparse.kernels.tiles import store_rows
from compiled_sparse.kernels.tiles import visible_keys


@triton.jit
def attend(
    q_rows, k_rows, v_rows, k_valid, state, factor, FULL: tl.constexpr, PRECISION: tl.constexpr
):
    """Take more keys into the running softmax `state`: largest score, total weight, values.

    Scores are scaled by `factor`, in base 2; with `FULL` every key is valid.
    """
    top, total, values = state
    zeros = tl.zeros([q_rows.shape[0], k_rows.shape[0]], values.dtype)
    scores = product(q_rows, tl.trans(k_rows), zeros, PRECISION)
    if not FULL:
        scores = tl.where(k_valid[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen no key yet: any finite number keeps -inf - -inf out.
    shift = new_top if FULL else tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    values = product(weights, v_rows, values * shrink[:, None], PRECISION)
    return new_top, total, values


@triton.jit
def finish(top, total, values):
    """Return the output and the natural log-sum-exp of a running softmax."""
    seen = total != 0.0  # NaN is seen, and handed on
    total = tl.where(seen, total, 1.0)
    log_sum = tl.where(seen, (top + tl.log2(total)) * LN_2, float("-inf"))
    return values / total[:, None], log_sum


@triton.jit
def positive_factor(q_rows, scale, SUM: tl.constexpr):
    """Return queries and a positive factor to base 2 that together make the scaled scores.

    With it the maximum can be taken before multiplying; it is not 0, so that -inf stays -inf.
    """
    q_rows = tl.where(scale < 0, -q_rows, q_rows)
    return q_rows, tl.maximum(tl.abs(tl.full([], scale, SUM)) * LOG2_E, 1e-37)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    indices,
    counts,
    order,
    key_mask,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    index_batch,
    index_head,
    index_row,
    order_batch,
    order_head,
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
    HAS_TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    JOINED: tl.constexpr,
    K_FULL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write `out` and the natural log-sum-exp of one chunk of a query block.

    Strides are (batch, head, token) in elements, and 1 along the head dimension; those of lists are
    (batch, head, row) and 1. `ops.gpu` says what the arguments mean and computes them.
    """
    text = (before, behind)
    batch, head, row, chunk = program_position(
        order, rows, heads, (order_batch, order_head), Q_CHUNKS
    )
    slot = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    q_token, q_valid = block_tokens(row, slot, (q_t, q_h, q_w), text, Q_TILE, HAS_TEXT)
    q_base = head_base(q, q_strides, batch, head)
    q_rows = load_rows(q_base, q_token, q_valid, q_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    q_rows, factor = positive_factor(q_rows, scale, SUM)

    k_base = head_base(k, k_strides, batch, head // groups)
    v_base = head_base(v, v_strides, batch, head // groups)
    entries = (
        head_base(indices, (index_batch, index_head), batch, head) + row.to(tl.int64) * index_row
    )
    count = tl.load(head_base(counts, (order_batch, order_head), batch, head) + row)
    k_slot = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), SUM)
    total = tl.zeros([BLOCK_M], SUM)
    values = tl.zeros([BLOCK_M, BLOCK_D], SUM)
    for step in range(number_of_steps(count, K_CHUNKS, JOINED)):
        k_token, k_valid = step_tokens(
            entries,
            step,
            count,
            k_slot,
            (k_t, k_h, k_w),
            text,
            K_TILE,
            HAS_TEXT,
            BLOCK_N,
            K_CHUNKS,
            JOINED,
        )
        if HAS_MASK:
            k_valid = visible_keys(key_mask, batch, k_length, k_token, k_valid)
        k_rows = load_rows(k_base, k_token, k_valid, k_strides[2], HEAD_DIM, BLOCK_D, WIDE)
        v_rows = load_rows(v_base, k_token, k_valid, v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
        top, total, values = attend(
            q_rows, k_rows, v_rows, k_valid, (top, total, values), factor, K_FULL, PRECISION
        )

    out_base = head_base(out, out_strides, batch, head)
    lse_base = lse + (batch * heads + head).to(tl.int64) * q_length
    values, log_sum = finish(top, total, values)
    store_rows(values, out_base, q_token, q_valid, out_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    tl.store(lse_base + q_token, log_sum, mask=q_valid)
