"""Block-sparse attention in torch operations, for machines without a compiler.

Works on a few query blocks and a few of their keys at a time, so that memory is bounded; always
in float32 or float64, as half-precision products are slow without hardware for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled_sparse.ops.tensors import compute_dtype
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs

_MAX_BLOCKS = 16
_MAX_QUERIES = 2048
_KEYS_PER_STEP = 512


def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.block_sparse_forward`."""
    lists = Lists(block_indices, block_counts, key_mask, q_tokens, kv_tokens)
    out, lse = empty_outputs(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for piece in lists.pieces(b, h):
                queries = _gather(q[b, h], piece.tokens, piece.unused) * scale
                rows, row_lse = _attend(queries, k[b, h // group], v[b, h // group], piece)
                piece.scatter(rows, out[b, h])
                piece.scatter(row_lse, lse[b, h, :, None])
    return out, lse


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
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `compiled_sparse.ops.cpu.block_sparse_backward`."""
    lists = Lists(block_indices, block_counts, key_mask, q_tokens, kv_tokens)
    grad_q, grad_k, grad_v = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
    group = q.shape[1] // k.shape[1]
    for b in range(k.shape[0]):
        for h_kv in range(k.shape[1]):
            keys = _KeyHead(k[b, h_kv], v[b, h_kv])
            for h in range(h_kv * group, (h_kv + 1) * group):
                for piece in lists.pieces(b, h):
                    queries = _query_rows(
                        *(q[b, h], out[b, h], grad_out[b, h], lse[b, h, :, None]),
                        *(None if grad_lse is None else grad_lse[b, h, :, None], piece, scale),
                    )
                    piece.scatter(_differentiate(queries, keys, piece) * scale, grad_q[b, h])
            grad_k[b, h_kv], grad_v[b, h_kv] = keys.grad_k, keys.grad_v
    return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class Piece:
    """A few query blocks (C) of one head and the key blocks (n) that they list.

    Attributes:
        tokens: int64 [C, Eq], query tokens, 0 in unused slots.
        unused: bool [C, Eq].
        listed: int64 [C, n], key blocks, 0 behind the end of a list.
        unlisted: bool [C, n], True behind the end of a list.
        kv_tokens: int32 [Nk, Ek].
        masked: bool [Lk], or None where no key is masked.
    """

    tokens: Tensor
    unused: Tensor
    listed: Tensor
    unlisted: Tensor
    kv_tokens: Tensor
    masked: Tensor | None

    def key_steps(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield key tokens int64 [C, S] and which of them are hidden, bool [C, S] or None."""
        width = max(1, _KEYS_PER_STEP // self.kv_tokens.shape[1])
        for start in range(0, self.listed.shape[1], width):
            tokens = self.kv_tokens[self.listed[:, start : start + width]].long()
            hidden = self.unlisted[:, start : start + width, None] | (tokens < 0)
            tokens = tokens.clamp_min(0)
            if self.masked is not None:
                hidden = hidden | self.masked[tokens]
            # Filling is a pass over all scores: worth leaving out where nothing is hidden.
            yield tokens.flatten(1), hidden.flatten(1) if hidden.any() else None

    def scatter(self, rows: Tensor, target: Tensor) -> None:
        """Write rows [C, Eq, D] of queries to their tokens in target [Lq, D]."""
        used = ~self.unused
        target[self.tokens[used]] = rows[used].to(target.dtype)


@dataclass(frozen=True)
class Lists:
    """The lists, mask and maps of a call, shaped as in `compiled_sparse.ops.cpu`."""

    block_indices: Tensor
    block_counts: Tensor
    key_mask: Tensor | None
    q_tokens: Tensor
    kv_tokens: Tensor

    def pieces(self, b: int, h: int) -> Iterator[Piece]:
        """Cut the query blocks of one head into pieces of bounded size."""
        head = (b if len(self.block_counts) > 1 else 0, h if self.block_counts.shape[1] > 1 else 0)
        indices = self.block_indices[
            b if len(self.block_indices) > 1 else 0, h if self.block_indices.shape[1] > 1 else 0
        ]
        masked = None if self.key_mask is None else ~self.key_mask[b]
        blocks, size = self.q_tokens.shape
        step = max(1, min(_MAX_BLOCKS, _MAX_QUERIES // size))
        for start in range(0, blocks, step):
            chosen = slice(start, start + step)
            tokens, counts = self.q_tokens[chosen].long(), self.block_counts[head][chosen]
            width = int(counts.max())
            unlisted = torch.arange(width) >= counts[:, None]
            listed = indices[chosen, :width].long().masked_fill(unlisted, 0)
            yield Piece(
                *(tokens.clamp_min(0), tokens < 0, listed, unlisted, self.kv_tokens, masked)
            )


class _KeyHead:
    """Keys and values [Lk, D] of one head and the sums of their gradients."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.v = v
        self.grad_k = torch.zeros(k.shape, dtype=compute_dtype(k))
        self.grad_v = torch.zeros(v.shape, dtype=compute_dtype(v))


@dataclass(frozen=True)
class _QueryRows:
    """What the backward needs of the queries of a piece; rows of dead queries are zero.

    Attributes:
        q: [C, Eq, D], scaled.
        grad_out: [C, Eq, D].
        lse: [C, Eq, 1].
        delta: [C, Eq, 1], the share of a score's gradient that is common to a row.
    """

    q: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor


def _query_rows(
    q: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    piece: Piece,
    scale: float,
) -> _QueryRows:
    """Gather the rows of a piece from one head: [Lq, D], or [Lq, 1] for both lse."""
    dead = piece.unused | (lse[:, 0] == float("-inf"))[piece.tokens]
    rows_grad_out = _gather(grad_out, piece.tokens, dead)
    delta = (_gather(out, piece.tokens, dead) * rows_grad_out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= _gather(grad_lse, piece.tokens, dead)
    return _QueryRows(
        q=_gather(q, piece.tokens, dead) * scale,
        grad_out=rows_grad_out,
        lse=_gather(lse, piece.tokens, dead),
        delta=delta,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Return the attention of scaled q [C, Eq, D] and its log-sum-exp [C, Eq, 1]."""
    out = torch.zeros_like(q)
    top = q.new_full((*q.shape[:-1], 1), float("-inf"))
    total = torch.zeros_like(top)
    for tokens, hidden in piece.key_steps():
        keys, values = _gather(k, tokens, hidden), _gather(v, tokens, hidden)
        scores = q @ keys.mT
        if hidden is not None:
            scores.masked_fill_(hidden[:, None], float("-inf"))
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        # Where nothing is visible yet, -inf - 0 gives weight 0 and -inf - -inf would give NaN.
        reference = higher.masked_fill(higher == float("-inf"), 0)
        weights = scores.sub_(reference).exp_()
        decay = (top - reference).exp_()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = torch.baddbmm(out.mul_(decay), weights, values)
        top = higher
    lse = top + total.log()
    return out.div_(total.masked_fill_(total == 0, 1)), lse


def _differentiate(queries: _QueryRows, keys: _KeyHead, piece: Piece) -> Tensor:
    """Add to the gradients of the keys; return that of the scaled queries [C, Eq, D]."""
    grad_q = torch.zeros_like(queries.q)
    for tokens, hidden in piece.key_steps():
        k, v = _gather(keys.k, tokens, hidden), _gather(keys.v, tokens, hidden)
        p = (queries.q @ k.mT).sub_(queries.lse).exp_()
        if hidden is not None:
            p.masked_fill_(hidden[:, None], 0)
        grad_scores = (queries.grad_out @ v.mT).sub_(queries.delta).mul_(p)
        grad_q.baddbmm_(grad_scores, k)
        flat = tokens.flatten()
        # Hidden keys add zeros, to token 0.
        keys.grad_k.index_add_(0, flat, (grad_scores.mT @ queries.q).flatten(0, 1))
        keys.grad_v.index_add_(0, flat, (p.mT @ queries.grad_out).flatten(0, 1))
    return grad_q


def _gather(source: Tensor, tokens: Tensor, hidden: Tensor | None) -> Tensor:
    """Return rows [*tokens.shape, D] of source [L, D] to compute with, zero where hidden."""
    rows = source.index_select(0, tokens.flatten()).to(compute_dtype(source))
    rows = rows.view(*tokens.shape, -1)
    return rows if hidden is None else rows.masked_fill_(hidden[..., None], 0)
