"""Attention through a feature map: linear in the length, with a projection behind it.

Keys and values are first summed up in a matrix [head_dim, head_dim] for each head. The projection
is applied to that matrix, not to every token: the products are a third fewer, and so are the
roundings in half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.ops.tensors import product
from compiled_sparse.ops.video import per_query_head

_SMALLEST_SUM = 1e-5


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Weigh the values of all visible keys by products of features, and project the result.

    Features and the sums over keys are rounded to the dtype of the inputs, as published, because
    checkpoints are trained with that. For float16 they are float32: sums over a long video are
    beyond float16.

    Args:
        q: [batch, query heads, queries, head_dim].
        k: [batch, key heads, keys, head_dim].
        v: Like `k`.
        key_mask: bool [batch, keys], True where the key counts.
        feature_map: "softmax" (over the channels), "elu" (elu + 1) or "relu".
        weight: [head_dim, head_dim], as of `nn.Linear`.
        bias: [head_dim], or None.

    Returns:
        [batch, query heads, queries, head_dim] of q's dtype, float32 for float16.
    """
    work = torch.float32 if q.dtype == torch.float16 else q.dtype
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]
    k, v = _cleared(k, hidden), _cleared(v, hidden)
    queries, keys = (_features(each, feature_map).to(work) for each in (q, k))
    keys = _cleared(keys, hidden)
    sums = per_query_head(keys.sum(dim=-2, keepdim=True), q)
    products = product(keys.transpose(-1, -2), v.to(work))
    state = per_query_head(product(products, weight.to(work).t()), q)
    weights = (queries * sums).sum(dim=-1, keepdim=True) + _SMALLEST_SUM
    mixed = product(queries, state) / weights
    return mixed if bias is None else mixed + bias.to(work)


def _cleared(x: Tensor, hidden: Tensor | None) -> Tensor:
    return x if hidden is None else x.masked_fill(hidden, 0.0)


def _features(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    if feature_map == "elu":
        return F.elu(x) + 1.0
    return x.relu()
