"""Which chunks each query selects, by the compiled C++ kernels."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from compiled_sparse.ops.bit_masks import words_for
from compiled_sparse.ops.cpu.build import native_library
from compiled_sparse.ops.cpu.native_call import DTYPES
from compiled_sparse.ops.cpu.native_call import NativeTensor
from compiled_sparse.ops.cpu.native_call import address
from compiled_sparse.ops.cpu.native_call import call
from compiled_sparse.ops.cpu.native_call import describe_tensor
from compiled_sparse.ops.cpu.native_call import unit_stride
from compiled_sparse.ops.tensors import compute_dtype

_SIZES: Final = (
    *("batch", "q_heads", "kv_heads", "q_len", "dim", "chunks"),
    *("text_before", "text_after", "runs_before", "runs_after", "count"),
)
_ADDRESSES: Final = ("means", "own", "chunk_visible", "query_visible", "selected")


class _Selection(ctypes.Structure):
    """`Selection` of selection.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threshold", ctypes.c_double),
        ("q", NativeTensor),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("by_threshold", ctypes.c_int32),
    )


def select_per_query(
    q: Tensor,
    means: Tensor,
    own: Tensor,
    chunk_visible: Tensor | None,
    query_visible: Tensor | None,
    *,
    text_before: int,
    text_after: int,
    runs_before: int,
    runs_after: int,
    mode: str,
    count: int,
    threshold: float,
) -> Tensor:
    """See `compiled_sparse.ops.cpu.select_per_query`."""
    q, own, means = unit_stride(q), own.contiguous(), means.to(compute_dtype(q)).contiguous()
    chunk_visible, query_visible = _contiguous(chunk_visible), _contiguous(query_visible)
    chunks = means.shape[2]
    shape = (*q.shape[:2], runs_before + chunks + runs_after, words_for(q.shape[2]))
    selected = torch.empty(shape, dtype=torch.int32)
    if not selected.numel():
        return selected
    selection = _Selection(
        *(*q.shape[:2], means.shape[1], *q.shape[2:], chunks),
        *(text_before, text_after, runs_before, runs_after, count),
        *(threshold, describe_tensor(q)),
        *(address(x) for x in (means, own, chunk_visible, query_visible, selected)),
        *(DTYPES[q.dtype], torch.get_num_threads(), mode == "threshold"),
    )
    facts = f"{chunks} chunks and the chunk of each of {len(own)} tokens"
    call(native_library().handle.select_per_query, selection, facts)
    return selected


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
