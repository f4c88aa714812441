"""Calls of `scaled_dot_product_attention` as nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.operator_schemas import normalize_function

SDPA = F.scaled_dot_product_attention
_TARGETS = (SDPA, torch.ops.aten.scaled_dot_product_attention.default)


def is_sdpa(node: fx.Node) -> bool:
    """Whether a node is such a call."""
    return node.op == "call_function" and node.target in _TARGETS


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of such a call by name, as nodes or values."""
    normalized = normalize_function(SDPA, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    assert normalized is not None
    return dict(normalized.kwargs)
