"""`compiled_sparse::guard_statistics`: how far a sparse output is from dense attention.

Composite and without gradient: the compiler sees ordinary operations on a few rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.ops.library import LIBRARY

LIBRARY.define(
    "guard_statistics(Tensor q, Tensor k, Tensor v, Tensor out, Tensor? key_mask, int rows, "
    "float? scale) -> Tensor"
)


def _guard_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    key_mask: Tensor | None,
    rows: int,
    scale: float | None,
) -> Tensor:
    """Compare evenly spread rows; see `compiled_sparse.guard.read_findings`."""
    q, k, v, out = (each.detach() for each in (q, k, v, out))
    rows = min(rows, q.shape[2])
    positions = torch.arange(rows, device=q.device) * q.shape[2] // rows
    mask = None if key_mask is None else key_mask[:, None, None, :]
    gqa = q.shape[1] != k.shape[1]
    queries = q.index_select(2, positions)
    dense = F.scaled_dot_product_attention(queries, k, v, mask, scale=scale, enable_gqa=gqa)
    dense = dense.float()
    error = out.index_select(2, positions).float() - dense
    bad, dense_bad = (_count_bad(each) for each in (out, dense))
    return torch.stack([bad, error.square().sum(), dense.square().sum(), dense_bad])


def _count_bad(x: Tensor) -> Tensor:
    return x.isfinite().logical_not().sum().float()


LIBRARY.impl("guard_statistics", _guard_statistics, "CompositeImplicitAutograd")
