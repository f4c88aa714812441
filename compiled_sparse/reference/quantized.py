"""What quantised attention over listed blocks computes: an emulation, one key block at a time."""

from __future__ import annotations

import math
from typing import Final
from typing import Literal

import torch
from torch import Tensor

from compiled_sparse.layout import BlockLayout
from compiled_sparse.reference.blocks import block_of_token

LEVELS: Final = 127
SMALLEST_SCALE: Final = 1e-7
VALUE_RANGE: Final = 2.25
WEIGHT_RANGE: Final = 448.0
"""The largest float8_e4m3fn; the largest weight of a softmax is 1."""

HALF_BITS: Final = 15
"""Values in float16 are below 2 to this, so that none overflows."""

SMALLEST_AMAX: Final = 1e-30
"""Keeps the scale of a channel of zeros finite."""


def quantized_attention_over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    values: Literal["float8", "float16"] = "float8",
) -> tuple[Tensor, Tensor]:
    """Softmax attention in eight bits of every token over the tokens of its block's listed blocks.

    Queries, and keys less their mean, are int8 with one scale per block; values and softmax weights
    are float8_e4m3fn or float16, values with one scale per channel. Weights are rounded beside the
    largest score met so far along the list, so that the order of a list matters within rounding.
    All sums are float32. Values at masked keys never matter, even NaN.

    Args:
        q: [batch, query heads, query length, head_dim]; float32, bfloat16 or float16.
        k: [batch, key heads, key length, head_dim].
        v: like `k`.
        q_layout: How the queries are cut into blocks.
        kv_layout: How the keys are.
        block_indices: int32 [batch or 1, query heads or 1, query blocks, K].
        block_counts: int32 [batch or 1, query heads or 1, query blocks].
        key_mask: bool [batch, key length], True where the key is attended.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        values: What values and weights are rounded to.

    Returns:
        The output in v's dtype, and the natural log-sum-exp of the scaled scores, float32; the
        share of the mean key, which the softmax does not see, is in the log-sum-exp.
    """
    if key_mask is not None:
        k, v = (each.masked_fill(~key_mask[:, None, :, None], 0.0) for each in (k, v))
    q_block, k_block = (block_of_token(each).to(q.device) for each in (q_layout, kv_layout))
    mean = _mean(k, key_mask)
    smooth = k - mean
    if key_mask is not None:
        smooth = smooth.masked_fill(~key_mask[:, None, :, None], 0.0)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    q8, q_scale = _quantized(q, q_block, q_layout.num_blocks)
    k8, k_scale = _quantized(smooth, k_block, kv_layout.num_blocks)
    rounded, v_scale = _rounded_values(v, values)
    group = q.shape[1] // k.shape[1]
    k8, k_scale, rounded, v_scale, mean = (
        each.repeat_interleave(group, dim=1) for each in (k8, k_scale, rounded, v_scale, mean)
    )
    # Products of these integers are below 2^24 in sum: exact in float32.
    factor = q_scale[..., :, None] * k_scale[..., None, :] * (scale * math.log2(math.e))
    scores = (q8 @ k8.mT) * factor
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
    listed = _listed_keys(block_indices, block_counts, q_block, k_block)
    out, top, total = _online_softmax(scores, rounded, listed, values)
    out = out / total.masked_fill(total == 0, 1.0) * v_scale
    lse = (top + total.log2()) * math.log(2) + scale * (q.float() @ mean.float().mT)
    return out.to(v.dtype), lse[..., 0]


def _mean(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean of the visible keys in k's dtype, [batch, heads, 1, head_dim]; hidden keys are zero."""
    total = k.float().sum(dim=2, keepdim=True)
    if key_mask is None:
        return (total / max(k.shape[2], 1)).to(k.dtype)
    return (total / key_mask.sum(-1).clamp_min(1)[:, None, None, None]).to(k.dtype)


def _quantized(x: Tensor, block: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Integers up to 127 as float32, shaped like x, and the scale of each token's block."""
    x = x.float()
    largest = x.new_zeros(*x.shape[:2], blocks)
    largest.scatter_reduce_(2, block.expand(x.shape[:3]), x.abs().amax(-1), "amax")
    scale = (largest / LEVELS + SMALLEST_SCALE)[..., block]
    return (x / scale[..., None] + 0.5 * x.sign()).trunc(), scale


def _rounded_values(v: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """Values as the dtype holds them, in float32, and the scale of each channel."""
    amax = v.float().abs().amax(dim=2, keepdim=True).clamp_min(SMALLEST_AMAX)
    if values == "float8":
        return _round(v.float() * (VALUE_RANGE / amax), values), amax / VALUE_RANGE
    mantissa, _ = torch.frexp(amax)
    scale = amax / mantissa / 2**HALF_BITS
    return _round(v.float() / scale, values), scale


def _round(x: Tensor, values: str) -> Tensor:
    return x.to(torch.float8_e4m3fn if values == "float8" else torch.float16).float()


def _listed_keys(indices: Tensor, counts: Tensor, q_block: Tensor, k_block: Tensor) -> list[Tensor]:
    """For each place of the lists: bool [batch or 1, heads or 1, queries, keys] of its block."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    places = indices.masked_fill(~used, -1)[..., q_block, :].unbind(-1)
    return [place[..., None] == k_block for place in places]


def _online_softmax(
    scores: Tensor, rounded: Tensor, listed: list[Tensor], values: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of weighted values, largest score, and total weight; scores are in base 2."""
    peak = WEIGHT_RANGE if values == "float8" else 1.0
    top = scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    total = torch.zeros_like(top)
    out = scores.new_zeros(*scores.shape[:-1], rounded.shape[-1])
    for seen in listed:
        block = scores.masked_fill(~seen, float("-inf"))
        new_top = torch.maximum(top, block.amax(-1, keepdim=True))
        shift = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weights = (block - shift).exp2()
        decay = (top - shift).exp2()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + _round(weights * peak, values) @ rounded / peak
        top = new_top
    return out, top, total
