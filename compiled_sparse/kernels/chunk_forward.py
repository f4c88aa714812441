"""Forward of attention over chunks that each query selects: one program per segment of queries.

A program visits the chunks in order. The queries of its segment that selected a chunk are gathered
into full tiles and take the chunk's keys into their running softmax, which lies in global memory
between visits: a query's chunks are met by different rows of different tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiled_sparse.kernels.chunk_tokens import CHUNK_SIZES
from compiled_sparse.kernels.chunk_tokens import box_tokens
from compiled_sparse.kernels.chunk_tokens import chunk_box
from compiled_sparse.kernels.forward import attend
from compiled_sparse.kernels.forward import finish
from compiled_sparse.kernels.forward import positive_factor
from compiled_sparse.kernels.selections import count_selected
from compiled_sparse.kernels.selections import query_of_rank
from compiled_sparse.kernels.selections import recalled
from compiled_sparse.kernels.selections import remember
from compiled_sparse.kernels.tiles import head_base
from compiled_sparse.kernels.tiles import load_rows
from compiled_sparse.kernels.tiles import store_rows
from compiled_sparse.kernels.tiles import visible_keys


@triton.jit
def segment_position(words, segment, heads):
    """Return batch entry, head and first word of this program.

    The segments of a head follow each other, so that programs that run together visit the same
    chunk at about the same time and read its keys from the cache.
    """
    segments = tl.cdiv(words, segment)
    program = tl.program_id(0)
    head = program // segments % heads
    batch = program // segments // heads
    return batch, head, program % segments * segment


@triton.jit(do_not_specialize=CHUNK_SIZES)
def chunk_attention_forward(
    q,
    k,
    v,
    tops,
    totals,
    sums,
    scratch,
    selected,
    key_mask,
    q_strides,
    k_strides,
    v_strides,
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
    """Take the keys of all chunks into the running softmaxes of the queries of one segment.

    `tops` (-inf before), `totals` (0 before) and `sums` (anything) are these softmaxes as in
    `forward.attend`, SUM [batch, heads, q_length], `sums` with HEAD_DIM in addition. `scratch`
    is int32 [programs, 2 ** LEVELS + BLOCK_M]. `segment` is how many words of `selected` a program
    takes. `kernels.chunk_attention` computes the arguments.
    """
    grid = (grid_t, grid_h, grid_w)
    batch, head, first_word = segment_position(words, segment, heads)
    q_base = head_base(q, q_strides, batch, head)
    k_base = head_base(k, k_strides, batch, head // groups)
    v_base = head_base(v, v_strides, batch, head // groups)
    own_head = (batch * heads + head).to(tl.int64)
    row = selected + own_head * chunks * words
    tops += own_head * q_length
    totals += own_head * q_length
    sums += own_head * q_length * HEAD_DIM
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
            q_rows, factor = positive_factor(q_rows, scale, SUM)
            top = tl.load(tops + q_token, mask=q_valid, other=float("-inf"))
            total = tl.load(totals + q_token, mask=q_valid, other=0.0)
            seen = q_valid & (total != 0.0)
            values = load_rows(sums, q_token, seen, HEAD_DIM, HEAD_DIM, BLOCK_D, WIDE)
            for slot in range(0, box[3], BLOCK_N):
                k_slot = slot + tl.arange(0, BLOCK_N)
                k_valid = k_slot < box[3]
                k_token = box_tokens(box, k_slot, grid)
                if HAS_MASK:
                    k_valid = visible_keys(key_mask, batch, q_length, k_token, k_valid)
                k_rows = load_rows(k_base, k_token, k_valid, k_strides[2], HEAD_DIM, BLOCK_D, WIDE)
                v_rows = load_rows(v_base, k_token, k_valid, v_strides[2], HEAD_DIM, BLOCK_D, WIDE)
                top, total, values = attend(
                    q_rows, k_rows, v_rows, k_valid, (top, total, values), factor, False, PRECISION
                )
            q_token, q_valid = recalled(met, BLOCK_M)
            tl.store(tops + q_token, top, mask=q_valid)
            tl.store(totals + q_token, total, mask=q_valid)
            store_rows(values, sums, q_token, q_valid, HEAD_DIM, HEAD_DIM, BLOCK_D, WIDE)
        row += words


@triton.jit(do_not_specialize=["heads", "q_length"])
def finish_rows(
    out,
    lse,
    totals,
    sums,
    out_strides,
    heads,
    q_length,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn running softmaxes into `out` and, in place of the largest scores in `lse`, log-sum-exps.

    Arguments as in `chunk_attention_forward`.
    """
    parts = tl.cdiv(q_length, BLOCK_M)
    program = tl.program_id(0)
    token = program % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // parts % heads
    batch = program // parts // heads
    valid = token < q_length
    start = (batch * heads + head).to(tl.int64) * q_length
    top = tl.load(lse + start + token, mask=valid, other=float("-inf"))
    total = tl.load(totals + start + token, mask=valid, other=0.0)
    place = token.to(tl.int64)
    seen = valid & (total != 0.0)
    values = load_rows(sums + start * HEAD_DIM, place, seen, HEAD_DIM, HEAD_DIM, BLOCK_D, True)
    values, log_sum = finish(top, total, values)
    base = head_base(out, out_strides, batch, head)
    store_rows(values, base, place, valid, out_strides[2], HEAD_DIM, BLOCK_D, True)
    tl.store(lse + start + token, log_sum, mask=valid)
