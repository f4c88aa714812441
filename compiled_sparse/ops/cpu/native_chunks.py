"""Attention over selected chunks by the compiled C++ kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from compiled_sparse.ops.cpu.build import native_library
from compiled_sparse.ops.cpu.native_call import Problem
from compiled_sparse.ops.cpu.native_call import address
from compiled_sparse.ops.cpu.native_call import call
from compiled_sparse.ops.cpu.native_call import describe_attention
from compiled_sparse.ops.cpu.native_call import describe_tensor
from compiled_sparse.ops.cpu.native_call import unit_stride
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.chunk_forward`."""
    q, k, v, selected = unit_stride(q), unit_stride(k), unit_stride(v), selected.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    out, lse = empty_outputs(q)
    if not q.numel():
        return out, lse
    problem = describe_attention(q, k, v, key_mask, kv_tokens, scale)
    problem.selected = selected.data_ptr()
    problem.out, problem.lse = describe_tensor(out), lse.data_ptr()
    _call(native_library().handle.chunk_sparse_forward, problem)
    return out, lse


def chunk_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.chunk_backward`."""
    q, k, v, selected = unit_stride(q), unit_stride(k), unit_stride(v), selected.contiguous()
    out, grad_out, lse = unit_stride(out), unit_stride(grad_out), lse.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    grad_q, grad_k, grad_v = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
    if not q.numel():
        return grad_q, grad_k, grad_v
    problem = describe_attention(q, k, v, key_mask, kv_tokens, scale)
    problem.selected = selected.data_ptr()
    problem.out, problem.lse = describe_tensor(out), lse.data_ptr()
    problem.grad_out, problem.grad_lse = describe_tensor(grad_out), address(grad_lse)
    problem.grad_q, problem.grad_k = describe_tensor(grad_q), describe_tensor(grad_k)
    problem.grad_v = describe_tensor(grad_v)
    _call(native_library().handle.chunk_sparse_backward, problem)
    return grad_q, grad_k, grad_v


def _call(function: Callable[..., int], problem: Problem) -> None:
    call(function, problem, f"{problem.kv_blocks} chunks of {problem.q_len} tokens")
