"""Learned gates of attention modules: added, traced and taken away, without editing the model.

A gate is a linear layer that is fed with what the queries are projected from; it is a child of the
attention module, so that checkpoints, optimisers, LoRA and sharding see it like any other layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import nn

from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import AttachError

GATE = "_compiled_sparse_gate"
"""On an attached module: name of its gate and width of the gate's input; no gate: an empty name."""

_NO_GATE = ("", 0)
_ADDED = "_compiled_sparse_added_gate"
_QUERY = re.compile(r"(?:.*_)?(?:w?q|query)(?:_proj|_linear)?")
_FUSED = re.compile(r"(?:.*_)?(?:w?qkv|query_key_value)(?:_proj|_linear)?", re.IGNORECASE)
_OF_TEXT = re.compile(r"text|txt|context|encoder|add_")


def wanted_gate(configs: Iterable[MechanismConfig]) -> str | None:
    """Return the name of the learned gate that a module's configs ask for, if any does.

    Raises:
        AttachError: if they ask for gates of different names.
    """
    names = sorted({config.gate_name for config in configs if config.gate_name is not None})
    if len(names) > 1:
        raise AttachError(
            "a module can have one learned gate",
            got="configs that name " + ", ".join(map(repr, names)),
            expected="one name",
            next_step="use one name for all; rules may differ in sparsity and tile",
        )
    return names[0] if names else None


def gate_name(module: nn.Module) -> str:
    """Return the name of the gate of an attached module; empty if it has none."""
    return str(getattr(module, GATE, _NO_GATE)[0])


def check_gate(module: nn.Module, name: str | None) -> None:
    """Check that a module can have a gate, without changing it.

    Raises:
        AttachError: if its name is taken, it has another gate, or nothing tells the gate's size.
    """
    if name is None:
        return
    has = gate_name(module)
    taken = getattr(module, name, None)
    if has not in ("", name) or not (taken is None or isinstance(taken, nn.Module)):
        raise AttachError(
            "the module cannot have a learned gate of this name",
            got=f"gate {name!r}; {type(module).__name__} has "
            + (f"the gate {has!r}" if has else f"something else there: {taken!r}"[:80]),
            expected="a free name, or that of a gate which the module already has",
            next_step="remove what was attached before, or choose another name",
        )
    _width(module, name)


def add_gate(module: nn.Module, name: str | None) -> None:
    """Give a module a gate, zero at first, unless it has one of this name.

    Args:
        module: An attention module for which `check_gate` holds.
        name: The gate's name; None leaves the module's gate as it is.
    """
    if name is None:
        setattr(module, GATE, getattr(module, GATE, _NO_GATE))
        return
    width, out_width = _width(module, name)
    if getattr(module, name, None) is None:
        like = next(_projection(module)[0].parameters())
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        gate = nn.Linear(width, out_width, device=like.device, dtype=dtype)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        module.add_module(name, gate)
        setattr(module, _ADDED, name)
    setattr(module, GATE, (name, width))


def remove_gate(module: nn.Module) -> None:
    """Take away the gate that `add_gate` gave to a module; one of its own stays."""
    added = module.__dict__.pop(_ADDED, None)
    module.__dict__.pop(GATE, None)
    if added is not None and hasattr(module, added):
        delattr(module, added)


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
    return [gate(source), source, *fitting]


def _as_taken(gate: nn.Module, given: Tensor) -> Tensor:
    """Cast an argument as a module does that casts for its projections; autocast does by itself."""
    dtypes = {each.dtype for each in gate.parameters() if each.is_floating_point()}
    if len(dtypes) != 1 or torch.is_autocast_enabled(given.device.type):
        return given
    return given.to(dtypes.pop())


def _projection(module: nn.Module) -> tuple[nn.Module, int]:
    """Return the layer that makes the queries, and of how many parts it makes one."""
    linear = [
        (name, each)
        for name, each in module.named_children()
        if _features(each) is not None and not _OF_TEXT.search(name)
    ]
    for pattern, parts in ((_QUERY, 1), (_FUSED, 3)):
        found = [each for name, each in linear if pattern.fullmatch(name)]
        if found:
            return found[0], parts
    raise AttachError(
        "nothing tells how wide the module's learned gate is",
        got=f"{type(module).__name__} with the children "
        + (", ".join(name for name, _ in module.named_children()) or "(none)"),
        expected="a linear layer called like to_q, q_proj, query or qkv",
        next_step="give the module a gate of its own, nn.Linear(channels, heads * head_dim)",
    )


def _width(module: nn.Module, name: str) -> tuple[int, int]:
    """Return the widths of the gate's input and output."""
    own = getattr(module, name, None)
    features = None if own is None else _features(own)
    if features is not None:
        return features
    projection, parts = _projection(module)
    width, out_width = _features(projection) or (0, 0)
    return width, out_width // parts


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return a linear layer's widths; layers that wrap one, as LoRA's do, have them too."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    width, out_width = widths
    return (width, out_width) if isinstance(width, int) and isinstance(out_width, int) else None
