"""Quantised block-sparse attention by the compiled C++ kernels, on numbers rounded beforehand.

Weights are rounded beside the largest score up to their chunk of at most 64 keys, where
`ops.cpu.quantized` takes whole blocks: the same for blocks of up to 64 keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.ops.cpu import native
from compiled_sparse.ops.quantization import DTYPES
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
    rounded = (v * multiplier).to(DTYPES[values]).float()
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
    x = x.float()
    used = tokens >= 0
    largest = x.abs().amax(-1)[..., tokens.clamp_min(0)].masked_fill(~used, 0.0).amax(-1)
    block = torch.empty(x.shape[2], dtype=torch.int64)
    block[tokens[used].long()] = torch.arange(len(tokens))[:, None].expand_as(tokens)[used]
    scales = (largest / LEVELS + SMALLEST_SCALE)[..., block, None]
    return (x / scales).add_(x.sign(), alpha=0.5).trunc_().mul_(scales)
