"""Cases of sparse-linear attention, and what tests of op and reference call with them."""

from __future__ import annotations

from typing import Any

import sla_oracle
import torch
import torch.nn.functional as F
from attending import Attend
from attending import Chosen
from attending import Inputs
from sla_oracle import Case
from torch import Tensor

import compiled_sparse as cs

GRID, TEXT = (5, 7, 3), (4, 9)
BOXES = Case(GRID, (2, 3, 2), (2, 2, 2), 0.4, TEXT)
RUNS = Case((61,), (8,), (4,), 0.3)
CASES = {
    "runs": RUNS,
    "wider keys": Case((50,), (4,), (16,), 0.5),
    "boxes": Case(GRID, (2, 3, 2), (2, 3, 2), 0.3),
    "boxes and text": BOXES,
    "image": Case((13, 11), (3, 4), (5, 2), 0.2, (0, 5)),
    "more text than video": Case((3, 2), (2, 2), (1, 2), 0.6, (40, 3)),
    "one block": Case((3, 2, 2), (4, 4, 4), (4, 4, 4), 0.1, (2, 0)),
    "tiny ratio": Case((61,), (8,), (4,), 1e-6),
    "all blocks": Case(GRID, (2, 3, 2), (2, 2, 2), 1.0, TEXT),
}
ORDERS = ("published", "values", "quotients")
FEATURES = ("softmax", "elu", "relu")
NAMES = ("grad_q", "grad_k", "grad_v", "grad_weight", "grad_bias")


def config_of(case: Case, **changes: Any) -> cs.SLA:
    """The config that a case is about."""
    values: dict[str, Any] = {
        "topk_ratio": case.ratio,
        "feature_map": case.feature_map,
        "block_q": case.q_tile,
        "block_k": case.k_tile,
    }
    return cs.SLA(**{**values, **changes})


def sla(case: Case, module: Any = cs, **changes: Any) -> Attend:
    """`attention` of the package, or of another module, of q, k, v, weight and bias."""
    arguments: dict[str, Any] = {
        "config": config_of(case),
        "grid_thw": case.grid,
        "text": cs.Text(*case.text),
        "key_mask": case.key_mask,
        "scale": case.scale,
        "return_lse": True,
        **changes,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, *proj: Tensor) -> Any:
        weight, bias = (*proj, None)[:2] if proj else (None, None)
        given = None if weight is None else (weight, bias)
        return module.attention(q, k, v, proj=given, **arguments)

    return attend


def loops(case: Case, chosen: Chosen | None = None) -> Attend:
    """The oracle of q, k, v, weight and bias."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *proj: Tensor) -> tuple[Tensor, Tensor]:
        result = sla_oracle.attention(q, k, v, case, *proj, chosen=chosen)
        return result.out, result.lse

    return attend


def tensors(
    case: Case,
    *,
    heads: int = 2,
    kv_heads: int = 2,
    batch: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Queries, keys, values, and weight and bias in float32 at least; all want gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    qkv = [torch.randn(batch, n, case.length, head_dim) for n in (heads, kv_heads, kv_heads)]
    proj = [torch.randn(head_dim, head_dim), torch.randn(head_dim)]
    both = [*(each.to(dtype) for each in qkv), *(each.to(wide) for each in proj)]
    return [each.requires_grad_() for each in both]


def padding(case: Case) -> Tensor:
    """A key mask that hides whole blocks of one sequence and half of the other."""
    key_mask = torch.rand(2, case.length) < 0.5
    key_mask[0, case.k_blocks[-1]] = False
    key_mask[0, case.k_blocks[0][0]] = True
    key_mask[1, case.k_blocks[0]] = True
    return key_mask


def published_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    case: Case,
    weight: Tensor,
    bias: Tensor | None = None,
    order: str = "published",
) -> Tensor:
    """The linear branch as published, operation by operation in the dtype of the inputs.

    The one difference is the documented one: behind its features float16 goes on in float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        case: What is computed.
        weight: Of the projection.
        bias: The same.
        order: One of `ORDERS`: "values" are projected before they are weighed, or "quotients" taken
            before products, which in exact arithmetic changes nothing.
    """
    work = torch.float32 if q.dtype == torch.float16 else q.dtype
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    queries, keys = (_published_feature(x, case.feature_map).to(work) for x in (q, k))
    if case.key_mask is not None:
        keys = keys * case.key_mask[:, None, :, None]
    values, weight = v.to(work), weight.to(work)
    values = values @ weight.t() if order == "values" else values
    products = keys.transpose(-1, -2) @ values
    weights = 1e-5 + (queries * keys.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)
    quotients = order == "quotients"
    mixed = (queries / weights) @ products if quotients else (queries @ products) / weights
    bias = None if bias is None else bias.to(work)
    if order != "values":
        return F.linear(mixed, weight, bias)
    return mixed if bias is None else mixed + bias


def _published_feature(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "softmax":
        return F.softmax(x, dim=-1)
    return F.elu(x) + 1 if feature_map == "elu" else F.relu(x)
