"""Attention over selected chunks in torch operations, for machines without a compiler.

Chunk by chunk, the queries that selected it are gathered and take its keys into their running
softmax; always in float32 or float64, as half-precision products are slow without hardware.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_sparse.ops.bit_masks import unpack_bits
from compiled_sparse.ops.tensors import compute_dtype
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs

_MAX_QUERIES = 2048


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
    out, lse = empty_outputs(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        chunks = _visible_tokens(kv_tokens, key_mask, b)
        for h in range(q.shape[1]):
            queries = q[b, h].to(compute_dtype(q)) * scale
            pairs = _pairs(selected[b, h], chunks, q.shape[2])
            rows, lse[b, h] = _attend(queries, k[b, h // group], v[b, h // group], pairs)
            out[b, h] = rows.to(out.dtype)
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
    grad_q, grad_k, grad_v = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
    group, compute = q.shape[1] // k.shape[1], compute_dtype(q)
    for b in range(k.shape[0]):
        chunks = _visible_tokens(kv_tokens, key_mask, b)
        for h_kv in range(k.shape[1]):
            keys, values = k[b, h_kv].to(compute), v[b, h_kv].to(compute)
            sums = torch.zeros_like(keys), torch.zeros_like(values)
            for h in range(h_kv * group, (h_kv + 1) * group):
                grad = grad_out[b, h].to(compute)
                delta = (grad * out[b, h].to(compute)).sum(-1)
                if grad_lse is not None:
                    delta -= grad_lse[b, h]
                rows = (q[b, h].to(compute) * scale, grad, lse[b, h], delta)
                pairs = _pairs(selected[b, h], chunks, q.shape[2])
                grad_q[b, h] = (_differentiate(rows, (keys, values), sums, pairs) * scale).to(
                    q.dtype
                )
            grad_k[b, h_kv], grad_v[b, h_kv] = sums
    return grad_q, grad_k, grad_v


def _visible_tokens(kv_tokens: Tensor, key_mask: Tensor | None, b: int) -> list[Tensor]:
    """Return the visible tokens of each chunk, int64."""
    chunks = [tokens[tokens >= 0].long() for tokens in kv_tokens]
    return chunks if key_mask is None else [tokens[key_mask[b, tokens]] for tokens in chunks]


def _pairs(selected: Tensor, chunks: list[Tensor], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of some queries, and those of the keys of a chunk that they selected."""
    for words, keys in zip(selected, chunks, strict=True):
        if len(keys):
            for queries in unpack_bits(words, length).nonzero()[:, 0].split(_MAX_QUERIES):
                if len(queries):
                    yield queries, keys


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pairs: Iterator[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return the attention of scaled queries [L, D] of one head, and its log-sum-exp [L]."""
    out = torch.zeros_like(q)
    top = q.new_full((len(q), 1), float("-inf"))
    total = torch.zeros_like(top)
    for queries, keys in pairs:
        scores = q[queries] @ k[keys].to(q.dtype).mT
        before = top[queries]
        higher = torch.maximum(before, scores.amax(-1, keepdim=True))
        weights = scores.sub_(higher).exp_()
        decay = (before - higher).exp_()
        top[queries] = higher
        total[queries] = total[queries] * decay + weights.sum(-1, keepdim=True)
        out[queries] = torch.addmm(out[queries] * decay, weights, v[keys].to(q.dtype))
    lse = top + total.log()
    return out.div_(total.masked_fill_(total == 0, 1)), lse[:, 0]


def _differentiate(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    tokens: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    pairs: Iterator[tuple[Tensor, Tensor]],
) -> Tensor:
    """Add to the gradients of the keys and values; return that of the scaled queries [L, D].

    `rows` are the scaled queries, the gradient of the output, the log-sum-exp, and delta, the share
    of a score's gradient that is common to a query.
    """
    q, grad_out, lse, delta = rows
    grad_q = torch.zeros_like(q)
    for queries, keys in pairs:
        k, v = tokens[0][keys], tokens[1][keys]
        some, grad = q[queries], grad_out[queries]
        p = (some @ k.mT).sub_(lse[queries, None]).exp_()
        grad_scores = (grad @ v.mT).sub_(delta[queries, None]).mul_(p)
        grad_q.index_add_(0, queries, grad_scores @ k)
        sums[0].index_add_(0, keys, grad_scores.mT @ some)
        sums[1].index_add_(0, keys, p.mT @ grad)
    return grad_q
