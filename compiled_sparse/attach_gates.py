"""Learned gates of attention modules: linear layers on what the queries are projected from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import nn

from compiled_sparse.attach_learned import LearnedLayer
from compiled_sparse.attach_learned import children_of
from compiled_sparse.attach_learned import features
from compiled_sparse.attach_learned import query_projection
from compiled_sparse.errors import AttachError


def traced_gate(module: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return a traced module's gate for an argument, that argument, and all that may be meant.

    Nothing where there is no gate, or no argument fits. What the queries are projected from is for
    the compiler to prove.
    """
    name, width = module._compiled_sparse_gate
    if not name:
        return []
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    fitting = [
        each
        for each in tensors
        if each.is_floating_point() and each.dim() == 3 and each.shape[-1] == width
    ]
    if not fitting:
        return []
    gate = getattr(module, name)
    source = _as_taken(gate, fitting[0])
    # A gate that is no linear layer may write into what it is given.
    given = source if features(gate) is not None else source.clone()
    return [gate(given), source, *fitting]


def _as_taken(gate: nn.Module, given: Tensor) -> Tensor:
    """Cast an argument as a module does that casts for its projections; autocast does by itself."""
    dtypes = {each.dtype for each in gate.parameters() if each.is_floating_point()}
    if len(dtypes) != 1 or torch.is_autocast_enabled(given.device.type):
        return given
    return given.to(dtypes.pop())


def _sizes(module: nn.Module) -> tuple[int, int]:
    found = query_projection(module)
    if found is None:
        raise AttachError(
            "nothing tells how wide the module's learned gate is",
            got=children_of(module),
            expected="a linear layer called like to_q, q_proj, query or qkv",
            next_step="give the module a gate of its own, nn.Linear(channels, heads * head_dim)",
        )
    projection, parts = found
    width, out_width = features(projection) or (0, 0)
    return width, out_width // parts


def _dtype(module: nn.Module) -> torch.dtype:
    found = query_projection(module)
    assert found is not None
    like = next(found[0].parameters())
    return like.dtype if like.is_floating_point() else torch.get_default_dtype()


GATE = LearnedLayer("gate", lambda config: config.gate_name, _sizes, _dtype)
