"""Compiling a model beside whatever else is compiled of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# A model compiled by a backend of its own would use up the model's recompile limit, shared with the
# user's own torch.compile.
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters


def compiled_apart(model: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """Compile a model without counting as one of its recompilations."""
    if _CAN_ISOLATE:
        options: dict[str, Any] = {"isolate_recompiles": True}
        return torch.compile(model, backend=backend, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Before torch 2.13 the limit belongs to the code object, so each call gets its own. What the
    # model runs behind a graph break still counts.
    call.__code__ = call.__code__.replace()
    return torch.compile(call, backend=backend)


def plain(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `torch.compile(model)` or `model.compile()` was made from."""
    original: Callable[..., Any] = getattr(model, "_orig_mod", model)
    is_compiled = getattr(original, "_compiled_call_impl", None) is not None
    return getattr(original, "_call_impl", original) if is_compiled else original
