"""Calls of `scaled_dot_product_attention` as nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.operator_schemas import normalize_function

SDPA = F.scaled_dot_product_attention
INPUTS = ("query", "key", "value")
_TARGETS = (SDPA, torch.ops.aten.scaled_dot_product_attention.default)


def is_sdpa(node: fx.Node) -> bool:
    """Whether a node is such a call."""
    return node.op == "call_function" and node.target in _TARGETS


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of such a call by name, as nodes or values."""
    normalized = normalize_function(SDPA, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    assert normalized is not None
    return dict(normalized.kwargs)


def replace_inputs(node: fx.Node, inputs: Sequence[fx.Node]) -> None:
    """Hand such a call other queries, keys and values.

    Args:
        node: The call; edited.
        inputs: The three.
    """
    given = dict(zip(INPUTS, inputs, strict=True))
    node.args = (*inputs[: len(node.args)], *node.args[3:])
    node.kwargs = {name: given.get(name, value) for name, value in node.kwargs.items()}
