"""The chunk op on GPUs: what its arguments mean to the Triton kernels, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import three_axes
from compiled_sparse.ops.gpu import check_supported
from compiled_sparse.ops.gpu import unit_last_stride

if TYPE_CHECKING:
    from compiled_sparse.kernels.chunk_attention import ChunkCall


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    layout: BlockLayout,
    scale: float,
    outputs: tuple[Tensor, Tensor],
) -> None:
    """See `compiled_sparse.ops.chunk_attention.chunk_sparse_attention`; writes `outputs`.

    Raises:
        ShapeError: if the head size has no kernel.
        DtypeError: if the dtype has none.
    """
    from compiled_sparse.kernels import chunk_attention
    from compiled_sparse.kernels.launch import on_device_of

    with on_device_of(q):
        call = kernel_call(q, k, v, selected, key_mask, layout, scale)
        chunk_attention.forward(call, *outputs)


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
    layout: BlockLayout,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Differentiate `chunk_forward` for a fixed selection; writes `gradients`.

    There are no atomic additions: the same call gives the same bits.

    Raises:
        ShapeError: as in the forward.
        DtypeError: as in the forward.
    """
    from compiled_sparse.kernels import chunk_attention
    from compiled_sparse.kernels.launch import on_device_of

    with on_device_of(q):
        call = kernel_call(q, k, v, selected, key_mask, layout, scale)
        chunk_attention.backward(
            call,
            unit_last_stride(grad_out),
            None if grad_lse is None else grad_lse.contiguous(),
            unit_last_stride(out),
            lse.contiguous(),
            gradients,
        )
    if q.dtype == torch.float64:
        gradients[0].mul_(scale)


def kernel_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    layout: BlockLayout,
    scale: float,
) -> ChunkCall:
    """Return a call as the kernels take it; arguments as in `chunk_forward`.

    Raises:
        ShapeError: if the head size has no kernel.
        DtypeError: if the dtype has none.
    """
    from compiled_sparse.kernels.chunk_attention import ChunkCall

    check_supported(q)
    if q.dtype == torch.float64:
        # Triton passes numbers in float32, which would round the scale.
        q, scale = q * scale, 1.0
    q, k, v = map(unit_last_stride, (q, k, v))
    mask = None if key_mask is None else key_mask.contiguous()
    grid, tile = three_axes(layout.grid), three_axes(layout.tile)
    text = (layout.text_before, layout.text_after)
    return ChunkCall(q, k, v, selected.contiguous(), mask, grid, tile, text, scale)
