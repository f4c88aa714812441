"""Numbers that quantised attention derives from whole heads: the mean key, the scales of values."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from compiled_sparse.ops.tensors import compute_dtype

FLOAT8: Final = "float8"
FLOAT16: Final = "float16"

LEVELS: Final = 127
SMALLEST_SCALE: Final = 1e-7
PEAKS: Final = {FLOAT8: 448.0, FLOAT16: 1.0}
"""What weights, at most 1, are multiplied by before they are rounded."""

DTYPES: Final = {FLOAT8: torch.float8_e4m3fn, FLOAT16: torch.float16}
"""What values and weights are rounded to."""

_VALUE_RANGE: Final = 2.25
_HALF_BITS: Final = 15
_SMALLEST_AMAX: Final = 1e-30


def key_mean(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the mean of the visible keys [B, H, 1, D] in k's dtype, rounded once."""
    compute = compute_dtype(k)
    if key_mask is None:
        return (k.sum(dim=2, keepdim=True, dtype=compute) / k.shape[2]).to(k.dtype)
    count = key_mask.sum(-1).clamp_min(1)[:, None, None, None]
    visible = k.masked_fill(~key_mask[:, None, :, None], 0.0)
    return (visible.sum(dim=2, keepdim=True, dtype=compute) / count).to(k.dtype)


def value_scales(v: Tensor, key_mask: Tensor | None, values: str) -> tuple[Tensor, Tensor]:
    """Return what each channel of the visible values is multiplied by, and what undoes it.

    For float8 the largest magnitude of a channel becomes 2.25, which keeps sums small enough for
    chips that add in float16. For float16 it comes to lie between 2^14 and 2^15; the factor is a
    power of two, so that values in two bytes stay exact unless they are negligible beside it.

    Args:
        v: [B, H, L, D].
        key_mask: bool [B, L], True where a value is visible, or None.
        values: "float8" or "float16".

    Returns:
        Two float32 tensors [B, H, 1, D].
    """
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
    low, high = torch.aminmax(v, dim=2, keepdim=True)
    amax = torch.maximum(-low, high).float().clamp_min(_SMALLEST_AMAX)
    if values == FLOAT8:
        return _VALUE_RANGE / amax, amax / _VALUE_RANGE
    mantissa, _ = torch.frexp(amax)
    scale = amax / mantissa / 2**_HALF_BITS
    return 1 / scale, scale
