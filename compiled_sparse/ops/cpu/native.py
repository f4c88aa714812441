"""Block-sparse attention by the compiled C++ kernels, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from compiled_sparse.errors import BlockListError
from compiled_sparse.ops.cpu.build import native_library
from compiled_sparse.ops.quantization import FLOAT8
from compiled_sparse.ops.quantization import FLOAT16
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs

_DTYPES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# `Weights` of rounding.h.
_WEIGHTS: Final = {None: 0, FLOAT8: 1, FLOAT16: 2}

# `Status` of block_sparse.cpp.
_OK: Final = 0
_NO_MEMORY: Final = 1

_SIZES: Final = (
    *("batch", "q_heads", "kv_heads", "q_len", "kv_len", "dim"),
    *("q_blocks", "q_block", "kv_blocks", "kv_block", "list"),
    *("indices_batch", "indices_head", "counts_batch", "counts_head"),
)
_ADDRESSES: Final = ("indices", "counts", "q_tokens", "kv_tokens", "key_mask")


class _Tensor(ctypes.Structure):
    """`Tensor` of rows.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class _Problem(ctypes.Structure):
    """`Problem` of layout.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *((name, _Tensor) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("grad_lse", ctypes.c_void_p),
    )


def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
    weights: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.block_sparse_forward`.

    `weights`, "float8" or "float16", rounds those of float32 before they meet the values, those for
    float8 times 448: the output comes out as much larger.
    """
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    block_indices, block_counts = block_indices.contiguous(), block_counts.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    out, lse = empty_outputs(q)
    if not q.numel():
        return out, lse  # lists of no batch have no first row to read
    problem = _problem(q, k, v, block_indices, block_counts, key_mask, q_tokens, kv_tokens, scale)
    problem.out, problem.lse = _tensor(out), lse.data_ptr()
    problem.weights = _WEIGHTS[weights]
    _call(native_library().handle.block_sparse_forward, problem)
    return out, lse


def block_sparse_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.block_sparse_backward`."""
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    out, grad_out, lse = _unit_stride(out), _unit_stride(grad_out), lse.contiguous()
    block_indices, block_counts = block_indices.contiguous(), block_counts.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    grad_q, grad_k, grad_v = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
    if not q.numel():
        return grad_q, grad_k.zero_(), grad_v.zero_()
    problem = _problem(q, k, v, block_indices, block_counts, key_mask, q_tokens, kv_tokens, scale)
    problem.out, problem.lse = _tensor(out), lse.data_ptr()
    problem.grad_out, problem.grad_lse = _tensor(grad_out), _address(grad_lse)
    problem.grad_q, problem.grad_k = _tensor(grad_q), _tensor(grad_k)
    problem.grad_v = _tensor(grad_v)
    _call(native_library().handle.block_sparse_backward, problem)
    return grad_q, grad_k, grad_v


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), *x.stride()[:3])


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _broadcast_strides(lists: Tensor) -> tuple[int, int]:
    batch, head = lists.stride()[:2]
    return (batch if lists.shape[0] > 1 else 0, head if lists.shape[1] > 1 else 0)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
) -> _Problem:
    """Describe the inputs; the tensors must outlive the description."""
    problem = _Problem(
        *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]),
        *(*q_tokens.shape, *kv_tokens.shape, block_indices.shape[-1]),
        *(*_broadcast_strides(block_indices), *_broadcast_strides(block_counts)),
        *(_address(x) for x in (block_indices, block_counts, q_tokens, kv_tokens, key_mask)),
        *(scale, _DTYPES[q.dtype], torch.get_num_threads()),
    )
    problem.q, problem.k, problem.v = _tensor(q), _tensor(k), _tensor(v)
    return problem


def _call(function: Callable[..., int], problem: _Problem) -> None:
    status = function(ctypes.byref(problem))
    if status == _OK:
        return
    if status == _NO_MEMORY:
        raise MemoryError("no memory to pack the keys and values of block-sparse attention")
    raise BlockListError(
        "block lists or token maps point outside the tensors",
        got=f"{problem.kv_blocks} key blocks, lists of {problem.list}, "
        f"{problem.q_len} query tokens and {problem.kv_len} key tokens",
        expected="counts and indices in range, every token in one slot, -1 only behind tokens",
        next_step="check the layout that lists and token maps were made for",
    )
