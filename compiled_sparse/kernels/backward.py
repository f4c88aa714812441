"""Backward of block-sparse attention, without atomics: the same inputs always give the same bits.

Weights are computed again from queries, keys and the saved log-sum-exp. One program per chunk of a
key block sums the gradients of its keys and values along the transposed list, one per chunk of a
query block sums the gradient of its queries along the list (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.addressing import block_tokens
from compiled_sparse.kernels.addressing import number_of_steps
from compiled_sparse.kernels.addressing import step_tokens
from compiled_sparse.kernels.tiles import LOG2_E
from compiled_sparse.kernels.tiles import UNSPECIALIZED
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows
from compiled_sparse.kernels.tiles import product
from compiled_sparse.kernels.tiles import program_position
from compiled_sparse.kernels.tiles import store_rows
from compiled_sparse.kernels.tiles import visible_keys


@triton.jit(do_not_specialize=["heads", "q_length"])
def row_sums(
    grad_out,
    out,
    lse,
    grad_lse,
    delta,
    grad_strides,
    out_strides,
    heads,
    q_length,
    HAS_GRAD_LSE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write `delta` [batch, heads, q_length]: sum of out * grad_out, less the gradient of the lse.

    It is what the gradient of the scores subtracts from the gradient of the weights.
    """
    chunks = tl.cdiv(q_length, BLOCK_M)
    program = tl.program_id(0)
    head = program // chunks % heads
    batch = program // chunks // heads
    token = program % chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = token < q_length
    place = token.to(tl.int64)
    left = head_base(grad_out, grad_strides, batch, head)
    right = head_base(out, out_strides, batch, head)
    left = load_rows(left, place, valid, grad_strides[2], HEAD_DIM, BLOCK_D, True)
    right = load_rows(right, place, valid, out_strides[2], HEAD_DIM, BLOCK_D, True)
    sums = tl.sum(left.to(SUM) * right.to(SUM), 1)
    start = (batch * heads + head).to(tl.int64) * q_length
    if HAS_GRAD_LSE:
        sums -= tl.load(grad_lse + start + token, mask=valid, other=0.0)
    seen = tl.load(lse + start + token, mask=valid, other=0.0) != float("-inf")
    tl.store(delta + start + token, tl.where(seen, sums, 0.0), mask=valid)


@triton.jit
def load_log_sums(lse, start, token, valid):
    """Load the log-sum-exp in base 2; +inf where a query sees nothing, so that weights are zero."""
    log_sums = tl.load(lse + start + token, mask=valid, other=float("-inf"))
    return tl.where(log_sums == float("-inf"), float("inf"), log_sums * LOG2_E)


@triton.jit
def add_query_gradient(
    queries, k_rows, v_rows, k_valid, sums, factor, FULL: tl.constexpr, PRECISION: tl.constexpr
):
    """Add to `sums` what more keys give to the gradient of queries, still without the scale.

    `queries` are rows of q and of the gradient of the output, log-sum-exps in base 2, and what
    `row_sums` gives; `factor` is the scale in base 2. With `FULL` every key is valid.
    """
    q_rows, out_rows, log_sums, deltas = queries
    zeros = tl.zeros([q_rows.shape[0], k_rows.shape[0]], sums.dtype)
    scores = product(q_rows, tl.trans(k_rows), zeros, PRECISION)
    weights = tl.exp2(scores * factor - log_sums[:, None])
    if not FULL:
        weights = tl.where(k_valid[None, :], weights, 0.0)
    grad_weights = product(out_rows, tl.trans(v_rows), zeros, PRECISION)
    grad_scores = weights * (grad_weights - deltas[:, None])
    return product(grad_scores, k_rows, sums, PRECISION)


@triton.jit
def add_key_gradients(
    queries, k_rows, v_rows, k_valid, sums, factor, FULL: tl.constexpr, PRECISION: tl.constexpr
):
    """Add to `sums` what more queries give to the gradients of keys and values.

    Arguments as in `add_query_gradient`; the gradient of the keys is without the scale, too.
    """
    q_rows, out_rows, log_sums, deltas = queries
    k_sums, v_sums = sums
    # Transposed, keys by queries, so that both sums take them as the left factor.
    zeros = tl.zeros([k_rows.shape[0], q_rows.shape[0]], k_sums.dtype)
    scores = product(k_rows, tl.trans(q_rows), zeros, PRECISION)
    weights = tl.exp2(scores * factor - log_sums[None, :])
    if not FULL:
        weights = tl.where(k_valid[:, None], weights, 0.0)
    v_sums = product(weights, out_rows, v_sums, PRECISION)
    grad_weights = product(v_rows, tl.trans(out_rows), zeros, PRECISION)
    grad_scores = weights * (grad_weights - deltas[None, :])
    return product(grad_scores, q_rows, k_sums, PRECISION), v_sums


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_queries(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    indices,
    counts,
    order,
    key_mask,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_strides,
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
    """Write the gradient of the queries of one chunk of a query block.

    Arguments as in `forward.attention_forward`; `out_strides` are those of `grad_out`.
    """
    text = (before, behind)
    batch, head, row, chunk = program_position(
        order, rows, heads, (order_batch, order_head), Q_CHUNKS
    )
    slot = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    q_token, q_valid = block_tokens(row, slot, (q_t, q_h, q_w), text, Q_TILE, HAS_TEXT)
    q_base = head_base(q, q_strides, batch, head)
    out_base = head_base(grad_out, out_strides, batch, head)
    q_rows = load_rows(q_base, q_token, q_valid, q_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    out_rows = load_rows(out_base, q_token, q_valid, out_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    start = (batch * heads + head).to(tl.int64) * q_length
    log_sums = load_log_sums(lse, start, q_token, q_valid)
    deltas = tl.load(delta + start + q_token, mask=q_valid, other=0.0)
    factor = tl.full([], scale, SUM) * LOG2_E

    k_base = head_base(k, k_strides, batch, head // groups)
    v_base = head_base(v, v_strides, batch, head // groups)
    entries = (
        head_base(indices, (index_batch, index_head), batch, head) + row.to(tl.int64) * index_row
    )
    count = tl.load(head_base(counts, (order_batch, order_head), batch, head) + row)
    k_slot = tl.arange(0, BLOCK_N)
    queries = (q_rows, out_rows, log_sums, deltas)
    sums = tl.zeros([BLOCK_M, BLOCK_D], SUM)
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
        sums = add_query_gradient(queries, k_rows, v_rows, k_valid, sums, factor, K_FULL, PRECISION)

    grad_base = head_base(grad_q, grad_strides, batch, head)
    store_rows(sums * scale, grad_base, q_token, q_valid, grad_strides[2], HEAD_DIM, BLOCK_D, WIDE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_keys(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    entries,
    starts,
    order,
    key_mask,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_k_strides,
    grad_v_strides,
    index_batch,
    index_head,
    start_batch,
    start_head,
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
    """Write the gradients of the keys and values of one chunk of a key block.

    `rows` and `heads` count key blocks and key heads; a program sums over the `groups` query heads
    of its key head in order. `entries` and `starts` are the transposed lists, see `kernels.lists`.
    """
    text = (before, behind)
    batch, k_head, row, chunk = program_position(
        order, rows, heads, (order_batch, order_head), K_CHUNKS
    )
    slot = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    k_token, k_valid = block_tokens(row, slot, (k_t, k_h, k_w), text, K_TILE, HAS_TEXT)
    k_shown = k_valid
    if HAS_MASK:
        k_shown = visible_keys(key_mask, batch, k_length, k_token, k_valid)
    k_base = head_base(k, k_strides, batch, k_head)
    v_base = head_base(v, v_strides, batch, k_head)
    k_rows = load_rows(k_base, k_token, k_shown, k_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    v_rows = load_rows(v_base, k_token, k_shown, v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    factor = tl.full([], scale, SUM) * LOG2_E

    q_slot = tl.arange(0, BLOCK_M)
    k_sums = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    v_sums = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    for group in range(groups):
        head = k_head * groups + group
        q_base = head_base(q, q_strides, batch, head)
        out_base = head_base(grad_out, out_strides, batch, head)
        first_token = (batch * groups * heads + head).to(tl.int64) * q_length
        bounds = head_base(starts, (start_batch, start_head), batch, head) + row
        start = tl.load(bounds)
        count = tl.load(bounds + 1) - start
        listed = head_base(entries, (index_batch, index_head), batch, head) + start
        for step in range(number_of_steps(count, Q_CHUNKS, JOINED)):
            q_token, q_valid = step_tokens(
                listed,
                step,
                count,
                q_slot,
                (q_t, q_h, q_w),
                text,
                Q_TILE,
                HAS_TEXT,
                BLOCK_M,
                Q_CHUNKS,
                JOINED,
            )
            q_rows = load_rows(q_base, q_token, q_valid, q_strides[2], HEAD_DIM, BLOCK_D, WIDE)
            out_rows = load_rows(
                out_base, q_token, q_valid, out_strides[2], HEAD_DIM, BLOCK_D, WIDE
            )
            log_sums = load_log_sums(lse, first_token, q_token, q_valid)
            deltas = tl.load(delta + first_token + q_token, mask=q_valid, other=0.0)
            queries = (q_rows, out_rows, log_sums, deltas)
            k_sums, v_sums = add_key_gradients(
                queries, k_rows, v_rows, k_shown, (k_sums, v_sums), factor, K_FULL, PRECISION
            )

    grad_base = head_base(grad_k, grad_k_strides, batch, k_head)
    store_rows(
        k_sums * scale, grad_base, k_token, k_valid, grad_k_strides[2], HEAD_DIM, BLOCK_D, WIDE
    )
    grad_base = head_base(grad_v, grad_v_strides, batch, k_head)
    store_rows(v_sums, grad_base, k_token, k_valid, grad_v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
