"""The kernel op on GPUs: what its arguments mean to the Triton kernels, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Final

import torch
from torch import Tensor

from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import three_axes

if TYPE_CHECKING:
    from compiled_sparse.kernels.attention import Call

MAX_HEAD_DIM: Final = 256
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take on a GPU. Under the interpreter they take float64 too, for gradcheck."""


def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
    scale: float,
    outputs: tuple[Tensor, Tensor],
) -> None:
    """Attend from every query block to its listed key blocks.

    Products take operands of the dtype of the inputs and sum in float32; those of float32 follow
    `torch.backends.cuda.matmul.fp32_precision`. A query without a visible key gives zeros and a
    log-sum-exp of -inf; values at masked keys never matter, even NaN.

    Args:
        q: [B, Hq, Lq, D] of any strides; float32, bfloat16 or float16.
        k: [B, Hk, Lk, D] of q's dtype; Hq is a multiple of Hk.
        v: like `k`.
        block_indices: int32 [B or 1, Hq or 1, Nq, K], key blocks of each query block without
            repetition.
        block_counts: int32 [B or 1, Hq or 1, Nq], how many leading entries of a row are valid.
        key_mask: bool [B, Lk], True where a key is attended, or None.
        q_layout: How the queries are cut into blocks.
        kv_layout: How the keys are.
        scale: Softmax scale.
        outputs: Where to write the output, like q with last stride 1, and the natural log-sum-exp
            [B, Hq, Lq], contiguous.

    Raises:
        ShapeError: if the head size has no kernel.
        DtypeError: if the dtype has none.
    """
    from compiled_sparse.kernels import attention
    from compiled_sparse.kernels.launch import on_device_of

    lists = (block_indices, block_counts)
    with on_device_of(q):
        call = kernel_call(q, k, v, lists, key_mask, q_layout, kv_layout, scale)
        attention.block_sparse_forward(call, *outputs)


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
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Differentiate `block_sparse_forward` for fixed lists.

    There are no atomic additions, so it is deterministic with and without
    `torch.use_deterministic_algorithms`.

    Args:
        grad_out: [B, Hq, Lq, D] of q's dtype, any strides.
        grad_lse: [B, Hq, Lq] or None for zero.
        q: As in the forward, like all arguments not described here.
        k: See `q`.
        v: See `q`.
        out: The output of the forward.
        lse: The log-sum-exp of the forward.
        block_indices: See `q`.
        block_counts: See `q`.
        key_mask: See `q`.
        q_layout: See `q`.
        kv_layout: See `q`.
        scale: See `q`.
        gradients: Where to write the gradients of q, k and v, shaped and typed like them, last
            stride 1.

    Raises:
        ShapeError: as in the forward.
        DtypeError: as in the forward.
    """
    from compiled_sparse.kernels import attention
    from compiled_sparse.kernels.launch import on_device_of

    lists = (block_indices, block_counts)
    with on_device_of(q):
        call = kernel_call(q, k, v, lists, key_mask, q_layout, kv_layout, scale)
        attention.block_sparse_backward(
            call,
            unit_last_stride(grad_out),
            None if grad_lse is None else grad_lse.contiguous(),
            unit_last_stride(out),
            lse.contiguous(),
            gradients,
        )
    if call.q.dtype == torch.float64:
        gradients[0].mul_(scale)


def kernel_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
    scale: float,
) -> Call:
    """Return a call as the kernels take it; arguments as in `block_sparse_forward`.

    Raises:
        ShapeError: if the head size has no kernel.
        DtypeError: if the dtype has none.
    """
    from compiled_sparse.kernels.attention import Call
    from compiled_sparse.kernels.attention import Geometry

    check_supported(q)
    if q.dtype == torch.float64:
        # Triton passes numbers in float32, which would round the scale.
        q, scale = q * scale, 1.0
    geometry = Geometry(
        q_grid=three_axes(q_layout.grid),
        k_grid=three_axes(kv_layout.grid),
        q_tile=three_axes(q_layout.tile),
        k_tile=three_axes(kv_layout.tile),
        before=q_layout.text_before,
        behind=q_layout.text_after,
        q_blocks=q_layout.num_blocks,
        k_blocks=kv_layout.num_blocks,
    )
    q, k, v = map(unit_last_stride, (q, k, v))
    indices, counts = _stored_once(*lists)
    mask = None if key_mask is None else key_mask.contiguous()
    return Call(q, k, v, indices, counts, mask, geometry, scale)


def check_supported(q: Tensor) -> None:
    """Check that the kernels take tensors like q.

    Raises:
        ShapeError: if the head size has no kernel.
        DtypeError: if the dtype has none.
    """
    if q.is_cuda and q.dtype not in DTYPES:
        raise DtypeError(
            "the GPU kernels do not take this dtype",
            got=str(q.dtype),
            expected="one of " + ", ".join(map(str, DTYPES)),
            next_step="cast q, k and v, or run these calls on the CPU",
        )
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ShapeError(
            "the GPU kernels do not take this head size",
            got=f"head_dim {q.shape[-1]}",
            expected=f"at most {MAX_HEAD_DIM}",
            next_step="leave these calls dense (policy 'dense'), or run them on the CPU",
        )


def unit_last_stride(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last stride is not 1, as the kernels need it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _stored_once(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous lists; where both are expanded over batch entries or heads, stored once."""
    for axis in (0, 1):
        if indices.stride(axis) == 0 and counts.stride(axis) == 0:
            indices, counts = indices.narrow(axis, 0, 1), counts.narrow(axis, 0, 1)
    return indices.contiguous(), counts.contiguous()
