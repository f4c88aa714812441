"""What tests of quantised attention share: calls of op and reference, and the tolerance."""

from __future__ import annotations

from typing import Any

import torch
from helpers import Geometry
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.layout import BlockLayout
from compiled_sparse.reference.quantized import quantized_attention_over_blocks

ODD = Geometry((5, 7, 3), (2, 3, 2), (2, 4, 2), text_before=5, text_after=14)
ONE_AXIS = Geometry((61,), (16,), (10,), text_before=2, text_after=1, key_length=50)
FLIPPED = 0.01


def layouts(geometry: Geometry) -> tuple[BlockLayout, BlockLayout]:
    """Layouts of queries and keys."""
    text = (geometry.text_before, geometry.text_after)
    kv_grid = geometry.grid
    if geometry.key_length is not None:
        kv_grid = (geometry.key_length - sum(text),)
    return (
        BlockLayout(geometry.grid, geometry.q_tile, *text),
        BlockLayout(kv_grid, geometry.kv_tile, *text),
    )


def op(
    geometry: Geometry, tensors: tuple[Tensor, ...], lists: tuple[Tensor, Tensor], **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Call the op."""
    return cs.ops.quantized_block_sparse_attention(
        *tensors, *lists, **geometry.arguments(), **keywords
    )


def reference(
    geometry: Geometry, tensors: tuple[Tensor, ...], lists: tuple[Tensor, Tensor], **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Call the reference."""
    return quantized_attention_over_blocks(*tensors, *layouts(geometry), *lists, **keywords)


def hide(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return q, k, v with NaN in hidden keys and values, and the key mask."""
    q, k, v = tensors
    shown = torch.rand(k.shape[0], k.shape[2]) < 0.7
    shown[0, -3:] = False
    shown[:, 0] = True
    hidden = ~shown[:, None, :, None]
    return (q, k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan"))), shown


def assert_emulates(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], v: Tensor
) -> None:
    """Check a result against the reference: equal but for float32 rounding.

    Exponentials that differ in their last bit may round to neighbouring numbers of eight bits; one
    output in a hundred may be off by that.
    """
    out, lse = actual
    wanted, wanted_lse = expected
    assert out.shape == wanted.shape
    assert out.dtype == wanted.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    largest = float(v.float().nan_to_num(0.0).abs().max())
    error = (out.double() - wanted.double()).abs()
    budget = 2e-5 * largest + torch.finfo(out.dtype).eps * wanted.double().abs()
    assert not out.isnan().any()
    assert float((error > budget).double().mean()) <= FLIPPED
    assert float(error.max()) <= largest / 16
