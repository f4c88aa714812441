"""Backward of attention over chunks that each query selects, without atomics.

One program per segment of queries sums their gradient, chunk by chunk like the forward; one per
part of a chunk sums the gradients of its keys and values over the queries that selected it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.backward import add_key_gradients
from compiled_sparse.kernels.backward import add_query_gradient
from compiled_sparse.kernels.backward import load_log_sums
from compiled_sparse.kernels.chunk_forward import segment_position
from compiled_sparse.kernels.chunk_tokens import CHUNK_SIZES
from compiled_sparse.kernels.chunk_tokens import box_tokens
from compiled_sparse.kernels.chunk_tokens import chunk_box
from compiled_sparse.kernels.selections import count_selected
from compiled_sparse.kernels.selections import query_of_rank
from compiled_sparse.kernels.selections import recalled
from compiled_sparse.kernels.selections import remember
from compiled_sparse.kernels.tiles import LOG2_E
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows
from compiled_sparse.kernels.tiles import store_rows
from compiled_sparse.kernels.tiles import visible_keys


@triton.jit(do_not_specialize=CHUNK_SIZES)
def chunk_attention_backward_queries(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    sums,
    scratch,
    selected,
    key_mask,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    scale,
    words,
    segment,
    chunks,
    parts,
    heads,
    groups,
    q_length,
    before,
    behind,
    grid_t,
    grid_h,
    grid_w,
    tile_t,
    tile_h,
    tile_w,
    SUM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to `sums`, zero before, the gradient of the queries of a segment, without the scale.

    `sums` is SUM [batch, heads, q_length, HEAD_DIM]; `out_strides` are those of `grad_out`. All
    else is as in `chunk_forward.chunk_attention_forward`.
    """
    grid = (grid_t, grid_h, grid_w)
    batch, head, first_word = segment_position(words, segment, heads)
    q_base = head_base(q, q_strides, batch, head)
    k_base = head_base(k, k_strides, batch, head // groups)
    v_base = head_base(v, v_strides, batch, head // groups)
    out_base = head_base(grad_out, out_strides, batch, head)
    factor = tl.full([], scale, SUM) * LOG2_E
    own_head = (batch * heads + head).to(tl.int64)
    row = selected + own_head * chunks * words
    first_token = own_head * q_length
    sums += first_token * HEAD_DIM
    ranks = scratch + tl.program_id(0).to(tl.int64) * ((1 << LEVELS) + BLOCK_M)
    met = ranks + (1 << LEVELS)
    for chunk in range(chunks):
        count = count_selected(row, first_word, segment, q_length, ranks, LEVELS)
        box = chunk_box(chunk, grid, (tile_t, tile_h, tile_w), (before, behind))
        for start in range(0, count, BLOCK_M):
            rank = start + tl.arange(0, BLOCK_M)
            q_token, q_valid = query_of_rank(row, first_word, ranks, rank, count, LEVELS)
            remember(met, q_token, q_valid)
            q_rows = load_rows(q_base, q_token, q_valid, q_strides[2], HEAD_DIM, BLOCK_D, WIDE)
            out_rows = load_rows(
                out_base, q_token, q_valid, out_strides[2], HEAD_DIM, BLOCK_D, WIDE
            )
            log_sums = load_log_sums(lse, first_token, q_token, q_valid)
            deltas = tl.load(delta + first_token + q_token, mask=q_valid, other=0.0)
            queries = (q_rows, out_rows, log_sums, deltas)
            total = load_rows(sums, q_token, q_valid, HEAD_DIM, HEAD_DIM, BLOCK_D, WIDE)
            for slot in range(0, box[3], BLOCK_N):
                k_slot = slot + tl.arange(0, BLOCK_N)
                k_valid = k_slot < box[3]
                k_token = box_tokens(box, k_slot, grid)
                if HAS_MASK:
                    k_valid = visible_keys(key_mask, batch, q_length, k_token, k_valid)
                k_rows = load_rows(k_base, k_token, k_valid, k_strides[2], HEAD_DIM, BLOCK_D, WIDE)
                v_rows = load_rows(v_base, k_token, k_valid, v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
                total = add_query_gradient(
                    queries, k_rows, v_rows, k_valid, total, factor, False, PRECISION
                )
            q_token, q_valid = recalled(met, BLOCK_M)
            store_rows(total, sums, q_token, q_valid, HEAD_DIM, HEAD_DIM, BLOCK_D, WIDE)
        row += words


@triton.jit(do_not_specialize=CHUNK_SIZES)
def chunk_attention_backward_keys(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    scratch,
    selected,
    key_mask,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_k_strides,
    grad_v_strides,
    scale,
    words,
    segment,
    chunks,
    parts,
    heads,
    groups,
    q_length,
    before,
    behind,
    grid_t,
    grid_h,
    grid_w,
    tile_t,
    tile_h,
    tile_w,
    SUM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of the keys and values of one of the `parts` of a chunk.

    `heads` counts key heads; a program sums over the `groups` query heads of its key head in order,
    and over segments of `segment` words. All else is as in `chunk_attention_backward_queries`.
    """
    grid = (grid_t, grid_h, grid_w)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) << LEVELS
    slot = program % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = program // parts % chunks
    k_head = program // parts // chunks % heads
    batch = program // parts // chunks // heads
    box = chunk_box(chunk, grid, (tile_t, tile_h, tile_w), (before, behind))
    k_valid = slot < box[3]
    k_token = box_tokens(box, slot, grid)
    k_shown = k_valid
    if HAS_MASK:
        k_shown = visible_keys(key_mask, batch, q_length, k_token, k_valid)
    k_base = head_base(k, k_strides, batch, k_head)
    v_base = head_base(v, v_strides, batch, k_head)
    k_rows = load_rows(k_base, k_token, k_shown, k_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    v_rows = load_rows(v_base, k_token, k_shown, v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
    factor = tl.full([], scale, SUM) * LOG2_E

    # A part behind the end of a chunk that is cut off has no keys, and nothing to sum.
    last_word = tl.where(program % parts * BLOCK_N < box[3], words, 0)
    k_sums = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    v_sums = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    for group in range(groups):
        head = k_head * groups + group
        q_base = head_base(q, q_strides, batch, head)
        out_base = head_base(grad_out, out_strides, batch, head)
        own_head = (batch * groups * heads + head).to(tl.int64)
        first_token = own_head * q_length
        row = selected + (own_head * chunks + chunk) * words
        for first_word in range(0, last_word, segment):
            count = count_selected(row, first_word, segment, q_length, scratch, LEVELS)
            for start in range(0, count, BLOCK_M):
                rank = start + tl.arange(0, BLOCK_M)
                q_token, q_valid = query_of_rank(row, first_word, scratch, rank, count, LEVELS)
                q_rows = load_rows(q_base, q_token, q_valid, q_strides[2], HEAD_DIM, BLOCK_D, WIDE)
                out_rows = load_rows(
                    out_base, q_token, q_valid, out_strides[2], HEAD_DIM, BLOCK_D, WIDE
                )
                log_sums = load_log_sums(lse, first_token, q_token, q_valid)
                deltas = tl.load(delta + first_token + q_token, mask=q_valid, other=0.0)
                queries = (q_rows, out_rows, log_sums, deltas)
                k_sums, v_sums = add_key_gradients(
                    queries, k_rows, v_rows, k_shown, (k_sums, v_sums), factor, False, PRECISION
                )

    grad_base = head_base(grad_k, grad_k_strides, batch, k_head)
    store_rows(
        k_sums * scale, grad_base, k_token, k_valid, grad_k_strides[2], HEAD_DIM, BLOCK_D, WIDE
    )
    grad_base = head_base(grad_v, grad_v_strides, batch, k_head)
    store_rows(v_sums, grad_base, k_token, k_valid, grad_v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
