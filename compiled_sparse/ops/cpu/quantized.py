"""Quantised block-sparse attention in torch operations, rounded as the GPU kernels round.

Integers are held in float32, in which products of int8 matrices are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled_sparse.ops.cpu.portable import Lists
from compiled_sparse.ops.cpu.portable import Piece
from compiled_sparse.ops.quantization import DTYPES
from compiled_sparse.ops.quantization import LEVELS
from compiled_sparse.ops.quantization import PEAKS
from compiled_sparse.ops.quantization import SMALLEST_SCALE
from compiled_sparse.ops.quantization import key_mean
from compiled_sparse.ops.quantization import value_scales
from compiled_sparse.ops.tensors import empty_outputs

_KEYS_PER_STEP = 512


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
    lists = Lists(block_indices, block_counts, key_mask, q_tokens, kv_tokens)
    out, lse = empty_outputs(q)
    if not q.numel():
        return out, lse
    mean = key_mean(k, key_mask)
    multiplier, v_scale = value_scales(v, key_mask, values)
    group = q.shape[1] // k.shape[1]
    for b, h_kv in ((b, h) for b in range(k.shape[0]) for h in range(k.shape[1])):
        hidden = kv_tokens < 0
        if key_mask is not None:
            hidden = hidden | ~key_mask[b][kv_tokens.clamp_min(0)]
        smooth = k[b, h_kv] - mean[b, h_kv]
        codes, scales = _quantized(_blocks(smooth, kv_tokens, hidden))
        rounded = (_blocks(v[b, h_kv], kv_tokens, hidden) * multiplier[b, h_kv]).to(DTYPES[values])
        keys = _KeyHead(codes, scales, rounded.float(), hidden)
        for h in range(h_kv * group, (h_kv + 1) * group):
            shift = scale * (q[b, h].float() @ mean[b, h_kv].float().mT)
            for piece in lists.pieces(b, h):
                rows, row_lse = _attend(q[b, h], keys, piece, scale, values)
                piece.scatter(rows.mul_(v_scale[b, h_kv]), out[b, h])
                piece.scatter(row_lse.add_(shift[piece.tokens]), lse[b, h, :, None])
    return out, lse


@dataclass(frozen=True)
class _KeyHead:
    """Keys and values of one head by block (Nk, of Ek slots), zero where hidden.

    Attributes:
        codes: Integers, [Nk, Ek, D].
        scales: [Nk].
        values: [Nk, Ek, D], rounded.
        hidden: bool [Nk, Ek].
    """

    codes: Tensor
    scales: Tensor
    values: Tensor
    hidden: Tensor


def _blocks(rows: Tensor, tokens: Tensor, unused: Tensor) -> Tensor:
    """Return rows [L, D] as float32 [*tokens.shape, D], zero where unused."""
    chosen = rows.index_select(0, tokens.clamp_min(0).flatten()).float()
    return chosen.view(*tokens.shape, -1).masked_fill_(unused[..., None], 0.0)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers and scales [N] of blocks [N, E, D]."""
    scales = x.abs().amax((1, 2)) / LEVELS + SMALLEST_SCALE
    return (x / scales[:, None, None]).add_(x.sign(), alpha=0.5).trunc_(), scales


def _attend(
    q: Tensor, keys: _KeyHead, piece: Piece, scale: float, values: str
) -> tuple[Tensor, Tensor]:
    """Return the attention of a piece [C, Eq, D], by channel scale, and its lse [C, Eq, 1]."""
    codes, q_scales = _quantized(_blocks(q, piece.tokens, piece.unused))
    factors = q_scales[:, None] * keys.scales[piece.listed] * (scale * math.log2(math.e))
    peak, dtype = PEAKS[values], DTYPES[values]
    out = torch.zeros_like(codes)
    top = codes.new_full((*codes.shape[:-1], 1), float("-inf"))
    total = torch.zeros_like(top)
    width = max(1, _KEYS_PER_STEP // keys.codes.shape[1])
    for start in range(0, piece.listed.shape[1], width):
        step = slice(start, start + width)
        scores = _scores(codes, keys, piece, step, factors)
        # Each block is rounded beside the largest score up to it, as if it came by itself.
        tops = torch.maximum(scores.amax(-1), top).cummax(-1).values
        shifts = tops.masked_fill(tops == float("-inf"), 0.0)
        weights = scores.sub_(shifts[..., None]).exp2_()
        last = shifts[..., -1:]
        decay, fade = (tops - last).exp2_(), (top - last).exp2_()
        total = total * fade + (weights.sum(-1) * decay).sum(-1, keepdim=True)
        rounded = weights.mul_(peak).to(dtype).float().mul_(decay[..., None])
        listed = keys.values[piece.listed[:, step]]
        out = torch.baddbmm(out.mul_(fade), rounded.flatten(2), listed.flatten(1, 2))
        top = tops[..., -1:]
    lse = (top + total.log2()) * math.log(2)
    return out.div_(total.masked_fill_(total == 0, 1.0).mul_(peak)), lse


def _scores(codes: Tensor, keys: _KeyHead, piece: Piece, step: slice, factors: Tensor) -> Tensor:
    """Return scores in base 2, [C, Eq, blocks of the step, Ek]."""
    listed = piece.listed[:, step]
    scores = codes @ keys.codes[listed].flatten(1, 2).mT
    scores = scores.view(*scores.shape[:2], listed.shape[1], -1)
    scores.mul_(factors[:, None, step, None])
    hidden = keys.hidden[listed] | piece.unlisted[:, step, None]
    return scores.masked_fill_(hidden[:, None], float("-inf")) if hidden.any() else scores
