"""Host side of attention over chunks that each query selects: scratch memory, tiles and programs.

Nothing here waits for the device, and no size depends on what is selected.
"""

from __future__ import annotations

import math
from typing import Any
from typing import Final
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from compiled_sparse.kernels import launch
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.attention import ROW_ELEMENTS
from compiled_sparse.kernels.attention import Sides
from compiled_sparse.kernels.attention import needs_wide_addresses
from compiled_sparse.kernels.attention import padded_head_dim
from compiled_sparse.kernels.attention import product_kind
from compiled_sparse.kernels.attention import product_precision
from compiled_sparse.kernels.attention import row_strides
from compiled_sparse.kernels.attention import sum_dtype
from compiled_sparse.kernels.attention import write_row_sums
from compiled_sparse.kernels.chunk_backward import chunk_attention_backward_keys
from compiled_sparse.kernels.chunk_backward import chunk_attention_backward_queries
from compiled_sparse.kernels.chunk_forward import chunk_attention_forward
from compiled_sparse.kernels.chunk_forward import finish_rows
from compiled_sparse.kernels.tuning import Tile

LEVELS: Final = 6
MOST_WORDS: Final = 1 << LEVELS
"""In a segment, of 32 queries each: more fill tiles better, but make fewer programs."""

FEWEST_WORDS: Final = 8
PROGRAMS_PER_PROCESSOR: Final = 8
"""Wanted at least: they run two at a time, and the last ones run while others have ended."""

_PROCESSORS = 132
_LONG_SEGMENT = 32
_LARGE_CHUNK = 512
_FEW_ROWS, _MANY_ROWS = 64, 128


class ChunkCall(NamedTuple):
    """One call of the op, as the kernels take it.

    Args:
        q: [batch, query heads, length, head_dim], last stride 1.
        k: [batch, key heads, length, head_dim], last stride 1.
        v: Like `k`.
        selected: int32 [batch, query heads, chunks, words], contiguous.
        key_mask: bool [batch, length], contiguous, or None.
        grid: Token grid (T, H, W); grids of fewer axes have leading ones.
        tile: Sides of a chunk, likewise.
        text: Text tokens before and behind the grid.
        scale: Softmax scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    selected: Tensor
    key_mask: Tensor | None
    grid: Sides
    tile: Sides
    text: tuple[int, int]
    scale: float


def forward(call: ChunkCall, out: Tensor, lse: Tensor) -> None:
    """Write the attention of every query over its chunks, and its log-sum-exp.

    Args:
        call: The call.
        out: Like q, last stride 1.
        lse: float32 (float64 for float64) [batch, query heads, length], contiguous.
    """
    segment = _segment_words(call)
    tile = _choose("chunk_forward", call, *_sizes_for_queries(call, segment))
    programs = _segments(call, segment)
    scratch = call.selected.new_empty(programs, MOST_WORDS + tile.own)
    lse.fill_(float("-inf"))
    totals, sums = torch.zeros_like(lse), lse.new_empty(call.q.shape)
    arguments = (
        *(call.q, call.k, call.v, lse, totals, sums, scratch, call.selected, call.key_mask),
        *map(row_strides, (call.q, call.k, call.v)),
        *_integers(call, call.q.shape[1], segment),
    )
    launch.run(
        chunk_attention_forward,
        programs,
        arguments,
        _constants(call, sums, rows=tile.own, columns=tile.other),
        warps=tile.warps,
        stages=tile.stages,
    )
    _finish(out, lse, totals, sums)


def _finish(out: Tensor, lse: Tensor, totals: Tensor, sums: Tensor) -> None:
    batch, heads, length, head_dim = out.shape
    block_d = padded_head_dim(head_dim)
    rows = min(64, ROW_ELEMENTS // block_d)
    launch.run(
        finish_rows,
        batch * heads * triton.cdiv(length, rows),
        (out, lse, totals, sums, row_strides(out), heads, length),
        {"BLOCK_M": rows, "HEAD_DIM": head_dim, "BLOCK_D": block_d},
    )


def backward(
    call: ChunkCall,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of q k and v for a fixed selection; deterministic.

    Args:
        call: The call.
        grad_out: Like q, last stride 1.
        grad_lse: [batch, query heads, length], contiguous, or None for zero.
        out: The output of the forward, last stride 1.
        lse: The log-sum-exp of the forward, contiguous.
        gradients: Where to, last stride 1.
    """
    delta = torch.empty_like(lse)
    write_row_sums(grad_out, grad_lse, out, lse, delta)
    rows = (grad_out, lse, delta)
    _query_gradient(call, rows, gradients[0])
    _key_gradients(call, rows, gradients[1], gradients[2])


def _query_gradient(call: ChunkCall, rows: tuple[Tensor, Tensor, Tensor], grad_q: Tensor) -> None:
    segment = _segment_words(call)
    tile = _choose("chunk_backward_queries", call, *_sizes_for_queries(call, segment))
    programs = _segments(call, segment)
    scratch = call.selected.new_empty(programs, MOST_WORDS + tile.own)
    sums = rows[1].new_zeros(call.q.shape)
    arguments = (
        *(call.q, call.k, call.v, *rows, sums, scratch, call.selected, call.key_mask),
        *map(row_strides, (call.q, call.k, call.v, rows[0])),
        *_integers(call, call.q.shape[1], segment),
    )
    launch.run(
        chunk_attention_backward_queries,
        programs,
        arguments,
        _constants(call, rows[0], sums, rows=tile.own, columns=tile.other),
        warps=tile.warps,
        stages=tile.stages,
    )
    torch.mul(sums, call.scale, out=grad_q)


def _key_gradients(
    call: ChunkCall, rows: tuple[Tensor, Tensor, Tensor], grad_k: Tensor, grad_v: Tensor
) -> None:
    volume = math.prod(call.tile)
    own = _MANY_ROWS if volume >= _LARGE_CHUNK else _FEW_ROWS
    tile = _choose("chunk_backward_keys", call, own, _FEW_ROWS)
    parts = triton.cdiv(volume, tile.own)
    batch, heads = call.k.shape[:2]
    programs = batch * heads * call.selected.shape[2] * parts
    scratch = call.selected.new_empty(programs, MOST_WORDS)
    arguments = (
        *(call.q, call.k, call.v, *rows, grad_k, grad_v, scratch, call.selected, call.key_mask),
        *map(row_strides, (call.q, call.k, call.v, rows[0], grad_k, grad_v)),
        *_integers(call, heads, MOST_WORDS, parts),
    )
    launch.run(
        chunk_attention_backward_keys,
        programs,
        arguments,
        _constants(call, rows[0], grad_k, grad_v, rows=tile.other, columns=tile.own),
        warps=tile.warps,
        stages=tile.stages,
    )


def _segment_words(call: ChunkCall) -> int:
    """Return how many words of the selection a program for queries takes."""
    processors = _PROCESSORS
    if call.q.is_cuda:
        processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count
    words = call.selected.shape[0] * call.selected.shape[1] * call.selected.shape[3]
    wanted = words // (PROGRAMS_PER_PROCESSOR * processors)
    return min(max(wanted, FEWEST_WORDS), MOST_WORDS)


def _segments(call: ChunkCall, segment: int) -> int:
    batch, heads, _, words = call.selected.shape
    return batch * heads * int(triton.cdiv(words, segment))


def _sizes_for_queries(call: ChunkCall, segment: int) -> tuple[int, int]:
    """Return how many queries of a segment are likely to meet, and with how many keys.

    There are few different answers: each is another variant of a kernel.
    """
    queries = _MANY_ROWS if segment >= _LONG_SEGMENT else _FEW_ROWS
    return queries, min(math.prod(call.tile), _FEW_ROWS)


def _choose(kernel: str, call: ChunkCall, own: int, other: int) -> Tile:
    kind, head_dim = product_kind(call.q.dtype), call.q.shape[-1]
    return tuning.choose(kernel, tuning.current_chip(), kind, head_dim, own, other)


def _integers(call: ChunkCall, heads: int, segment: int, parts: int = 1) -> tuple[Any, ...]:
    """The run-time scalars of the kernels, in their order."""
    chunks, words = call.selected.shape[2:]
    groups = call.q.shape[1] // call.k.shape[1]
    counts = (words, segment, chunks, parts, heads, groups, call.q.shape[2])
    return (call.scale, *counts, *call.text, *call.grid, *call.tile)


def _constants(call: ChunkCall, *others: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """The compile-time arguments of the kernels.

    Args:
        call: The call.
        *others: Tensors with rows, beside those of the call.
        rows: Rows of queries at a step.
        columns: Rows of keys at a step.
    """
    head_dim = call.q.shape[-1]
    return {
        "SUM": sum_dtype(call.q),
        "HAS_MASK": call.key_mask is not None,
        "LEVELS": LEVELS,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "WIDE": any(map(needs_wide_addresses, (call.q, call.k, call.v, *others))),
        "PRECISION": product_precision(call.q.dtype),
    }
