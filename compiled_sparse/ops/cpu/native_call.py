"""How arguments reach the compiled C++ kernels, through ctypes, and errors come back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from compiled_sparse.errors import BlockListError

DTYPES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# `Status` of block_sparse.cpp.
_OK: Final = 0
_NO_MEMORY: Final = 1

_SIZES: Final = (
    *("batch", "q_heads", "kv_heads", "q_len", "kv_len", "dim"),
    *("q_blocks", "q_block", "kv_blocks", "kv_block", "list"),
    *("indices_batch", "indices_head", "counts_batch", "counts_head"),
)
_ADDRESSES: Final = ("indices", "counts", "q_tokens", "kv_tokens", "key_mask", "selected")


class NativeTensor(ctypes.Structure):
    """`Tensor` of rows.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class Problem(ctypes.Structure):
    """`Problem` of layout.h; the tensors must outlive it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        *((name, NativeTensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *((name, NativeTensor) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("grad_lse", ctypes.c_void_p),
    )


def unit_stride(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def describe_tensor(x: Tensor) -> NativeTensor:
    """Describe x [batch, heads, tokens, dim], of unit stride in the last dimension."""
    return NativeTensor(x.data_ptr(), *x.stride()[:3])


def address(x: Tensor | None) -> int | None:
    """Return where the first element of x lies."""
    return None if x is None else x.data_ptr()


def describe_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kv_tokens: Tensor, scale: float
) -> Problem:
    """Describe what every attention has; mask and map contiguous, the rest of unit stride."""
    problem = Problem(scale=scale, dtype=DTYPES[q.dtype], threads=torch.get_num_threads())
    problem.batch, problem.q_heads, problem.q_len, problem.dim = q.shape
    problem.kv_heads, problem.kv_len = k.shape[1:3]
    problem.kv_blocks, problem.kv_block = kv_tokens.shape
    problem.kv_tokens, problem.key_mask = address(kv_tokens), address(key_mask)
    problem.q, problem.k, problem.v = (describe_tensor(x) for x in (q, k, v))
    return problem


def call(function: Callable[..., int], problem: ctypes.Structure, facts: str) -> None:
    """Call a kernel; `facts` says in errors how many of what the lists and maps point to.

    Raises:
        MemoryError: if there is no memory to pack the keys.
        BlockListError: if a list or map is out of range.
    """
    status = function(ctypes.byref(problem))
    if status == _OK:
        return
    if status == _NO_MEMORY:
        raise MemoryError("no memory to pack the keys and values of block-sparse attention")
    raise BlockListError(
        "block lists or token maps point outside the tensors",
        got=facts,
        expected="counts and indices in range, every token in one slot, -1 only behind tokens",
        next_step="check the layout that lists and token maps were made for",
    )
