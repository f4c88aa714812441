"""Quantised block-sparse attention by the compiled C++ kernels, on numbers rounded beforehand.

Weights are rounded beside the largest score up to their chunk of at most 64 keys, where
`ops.cpu.quantized` takes whole blocks: the same for blocks of up to 64 keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_sparse.ops.cpu import native
from compiled_sparse.ops.quantization import DTYPES
from compiled_sparse.ops.quantization import FLOAT16
from compiled_sparse.ops.quantization import LEVELS
from compiled_sparse.ops.quantization import PEAKS
from compiled_sparse.ops.quantization import SMALLEST_SCALE
from compiled_sparse.ops.quantization import key_mean
from compiled_sparse.ops.quantization import value_scales


def quantized_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
    values: str,
) -> tuple[Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.quantized_forward`."""
    mean = key_mean(k, key_mask)
    smooth = k - mean
    if key_mask is not None:
        smooth = smooth.masked_fill(~key_mask[:, None, :, None], 0.0)
    multiplier, v_scale = value_scales(v, key_mask, values)
    rounded = _rounded_values(v, multiplier, values)
    out, lse = native.block_sparse_forward(
        _rounded(q, q_tokens),
        _rounded(smooth, kv_tokens),
        rounded.mul_(1 / PEAKS[values]),
        block_indices,
        block_counts,
        key_mask,
        q_tokens,
        kv_tokens,
        scale,
        values,
    )
    group = q.shape[1] // k.shape[1]
    mean, v_scale = (each.repeat_interleave(group, dim=1) for each in (mean, v_scale))
    share = scale * (q.float() @ mean.float().mT)
    return out.mul_(v_scale).to(v.dtype), lse.add_(share[..., 0])


def _rounded(x: Tensor, tokens: Tensor) -> Tensor:
    """Return x [B, H, L, D] as its int8 codes say, in float32."""
    used = tokens >= 0
    slots = tokens.clamp_min(0)
    block = torch.empty(x.shape[2], dtype=torch.int64)
    block[tokens[used].long()] = torch.arange(len(tokens))[:, None].expand_as(tokens)[used]
    out = torch.empty(x.shape, dtype=torch.float32)
    other = torch.empty(x.shape[2:], dtype=torch.float32)
    for head, row in _heads(x, out):  # one at a time, which stays in the cache
        row.copy_(head)
        torch.abs(row, out=other)
        largest = other.amax(-1)[slots].masked_fill_(~used, 0.0).amax(-1)
        scales = (largest / LEVELS + SMALLEST_SCALE)[block, None]
        torch.sign(row, out=other)
        row.div_(scales).add_(other, alpha=0.5).trunc_().mul_(scales)
    return out


def _rounded_values(v: Tensor, multiplier: Tensor, values: str) -> Tensor:
    """Return v [B, H, L, D] times the multipliers of its channels, rounded, in float32."""
    out = torch.empty(v.shape, dtype=torch.float32)
    for (head, row), factor in zip(_heads(v, out), multiplier.flatten(0, 1), strict=True):
        torch.mul(head, factor, out=row)
        row.copy_(row.to(DTYPES[values])) if values == FLOAT16 else _round_to_float8(row)
    return out


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the heads of all members of the batch, of several tensors at once."""
    for member in zip(*tensors, strict=True):
        yield from zip(*member, strict=True)


def _round_to_float8(x: Tensor) -> None:
    """Round float32 up to 448 to the nearest float8_e4m3fn in place, faster than torch casts."""
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_(min=0x3C800000)  # 2^-6: denormal below
    big = exponent.view(torch.float32).mul_(1.5 * 2**20)  # three binary digits are left beside it
    x.add_(big).sub_(big)
