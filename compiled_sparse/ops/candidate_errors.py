"""How far the output of a candidate is from dense attention, head by head.

Two opaque ops without gradient: a compiler keeps them in place between one candidate and the next,
and they work on one head at a time, so that what they need is small beside one output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.tensors import compute_dtype
from compiled_sparse.ops.tensors import resolve_scale

SUMS = (
    *("elements", "squared_error", "absolute_error", "squared_dense", "squared_sparse"),
    *("product", "rows", "captured_mass"),
)
"""What is summed over batch, tokens and channels, in the order of the last axis of the result."""

LIBRARY.define(
    "sampled_log_sums(Tensor q, Tensor k, Tensor? key_mask, int rows, float? scale) -> Tensor"
)
LIBRARY.define(
    "candidate_errors(Tensor dense, Tensor out, Tensor lse, Tensor sampled, Tensor? key_mask) "
    "-> Tensor"
)


def sampled_positions(length: int, rows: int, device: torch.device) -> Tensor:
    """Return evenly spread positions of a sequence, int64."""
    rows = min(rows, length)
    return torch.arange(rows, device=device) * length // rows


def _sampled_log_sums(
    q: Tensor, k: Tensor, key_mask: Tensor | None, rows: int, scale: float | None
) -> Tensor:
    """Log-sum-exp of dense attention at evenly spread rows, [batch, query heads, rows]."""
    dtype = compute_dtype(q)
    group = q.shape[1] // k.shape[1]
    queries = q.index_select(2, sampled_positions(q.shape[2], rows, q.device)).to(dtype)
    queries = queries * resolve_scale(scale, q)
    sums = queries.new_empty(queries.shape[:3])
    for head in range(q.shape[1]):
        scores = queries[:, head] @ k[:, head // group].to(dtype).transpose(1, 2)
        if key_mask is not None:
            scores.masked_fill_(~key_mask[:, None], -torch.inf)
        sums[:, head] = scores.logsumexp(-1)
    return sums


def _sampled_log_sums_fake(
    q: Tensor, k: Tensor, key_mask: Tensor | None, rows: int, scale: float | None
) -> Tensor:
    return q.new_empty((*q.shape[:2], torch.sym_min(rows, q.shape[2])), dtype=compute_dtype(q))


def _candidate_errors(
    dense: Tensor, out: Tensor, lse: Tensor, sampled: Tensor, key_mask: Tensor | None
) -> Tensor:
    """Sums over the tokens that are not hidden, float64 [query heads, len(SUMS)]."""
    batch, heads, length, head_dim = out.shape
    shown = out.new_ones((batch, length), dtype=torch.bool)
    if key_mask is not None:
        shown = shown & key_mask
    positions = sampled_positions(length, sampled.shape[2], out.device)
    mass = (lse.index_select(2, positions) - sampled).exp().double()
    counted = shown.index_select(1, positions)[:, None] & ~sampled.isneginf()
    sums = torch.empty(heads, len(SUMS), dtype=torch.float64, device=out.device)
    sums[:, 0] = shown.sum() * head_dim
    sums[:, -2] = counted.sum((0, 2))
    sums[:, -1] = mass.where(counted, 0.0).sum((0, 2))
    for head in range(heads):
        exact, sparse = (
            x[:, head].to(compute_dtype(x)).where(shown[..., None], 0.0) for x in (dense, out)
        )
        error = sparse - exact
        parts = (error.square(), error.abs(), exact.square(), sparse.square(), exact * sparse)
        sums[head, 1:-2] = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    return sums


def _candidate_errors_fake(
    dense: Tensor, out: Tensor, lse: Tensor, sampled: Tensor, key_mask: Tensor | None
) -> Tensor:
    return out.new_empty((out.shape[1], len(SUMS)), dtype=torch.float64)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("sampled_log_sums", _sampled_log_sums, _device)
    LIBRARY.impl("candidate_errors", _candidate_errors, _device)
for _name, _fake in (
    ("sampled_log_sums", _sampled_log_sums_fake),
    ("candidate_errors", _candidate_errors_fake),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
