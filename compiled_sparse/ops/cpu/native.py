"""Block-sparse attention by the compiled C++ kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor

from compiled_sparse.ops.cpu.build import native_library
from compiled_sparse.ops.cpu.native_call import Problem
from compiled_sparse.ops.cpu.native_call import address
from compiled_sparse.ops.cpu.native_call import call
from compiled_sparse.ops.cpu.native_call import describe_attention
from compiled_sparse.ops.cpu.native_call import describe_tensor
from compiled_sparse.ops.cpu.native_call import unit_stride
from compiled_sparse.ops.quantization import FLOAT8
from compiled_sparse.ops.quantization import FLOAT16
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs

# `Weights` of rounding.h.
_WEIGHTS: Final = {None: 0, FLOAT8: 1, FLOAT16: 2}


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
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    block_indices, block_counts = block_indices.contiguous(), block_counts.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    out, lse = empty_outputs(q)
    if not q.numel():
        return out, lse  # lists of no batch have no first row to read
    problem = _problem(q, k, v, block_indices, block_counts, key_mask, q_tokens, kv_tokens, scale)
    problem.out, problem.lse = describe_tensor(out), lse.data_ptr()
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
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, grad_out, lse = unit_stride(out), unit_stride(grad_out), lse.contiguous()
    block_indices, block_counts = block_indices.contiguous(), block_counts.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    grad_q, grad_k, grad_v = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
    if not q.numel():
        return grad_q, grad_k.zero_(), grad_v.zero_()
    problem = _problem(q, k, v, block_indices, block_counts, key_mask, q_tokens, kv_tokens, scale)
    problem.out, problem.lse = describe_tensor(out), lse.data_ptr()
    problem.grad_out, problem.grad_lse = describe_tensor(grad_out), address(grad_lse)
    problem.grad_q, problem.grad_k = describe_tensor(grad_q), describe_tensor(grad_k)
    problem.grad_v = describe_tensor(grad_v)
    _call(native_library().handle.block_sparse_backward, problem)
    return grad_q, grad_k, grad_v


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
) -> Problem:
    """Describe the inputs; the tensors must outlive the description."""
    problem = describe_attention(q, k, v, key_mask, kv_tokens, scale)
    problem.q_blocks, problem.q_block = q_tokens.shape
    problem.q_tokens = q_tokens.data_ptr()
    problem.list = block_indices.shape[-1]
    problem.indices, problem.counts = block_indices.data_ptr(), block_counts.data_ptr()
    problem.indices_batch, problem.indices_head = _broadcast_strides(block_indices)
    problem.counts_batch, problem.counts_head = _broadcast_strides(block_counts)
    return problem


def _call(function: Callable[..., int], problem: Problem) -> None:
    facts = (
        f"{problem.kv_blocks} key blocks, lists of {problem.list}, "
        f"{problem.q_len} query tokens and {problem.kv_len} key tokens"
    )
    call(function, problem, facts)
