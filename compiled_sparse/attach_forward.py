"""The patched `forward` of attached modules.

A patch is an instance attribute: a method over one function per class, with the class's own
signature. What belongs to the instance is read from its attributes, so that Dynamo shares one
compiled artifact among the blocks of a model.
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import nn

from compiled_sparse import ops as _ops  # noqa: F401 - registers the markers
from compiled_sparse.call_layout import read_grid
from compiled_sparse.errors import AttachError
from compiled_sparse.metadata import current_layout
from compiled_sparse.metadata import metadata

LAYER = "compiled_sparse_layer"
POLICY = "_compiled_sparse_policy"
INNER = "_compiled_sparse_inner"
NO_LAYER = (0,)
"""Shape of the layer buffer of a module that does not know its place in the model."""

_SIZES = ("num_frames", "height", "width")


def bind_module(module: nn.Module, policy: str, layer: int | None) -> None:
    """Let a module's traced `forward` emit a marker with its policy and layer index.

    Args:
        module: The attention module.
        policy: JSON of its policy, or empty to follow the backend's options.
        layer: Index among the attention layers of the model; None where not known.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    index = torch.empty(NO_LAYER if layer is None else (), dtype=torch.int64, device="cpu")
    if layer is not None:
        index.fill_(layer)
    module.register_buffer(LAYER, index.to(device), persistent=False)
    setattr(module, POLICY, policy)
    patch(module)


def patch(module: nn.Module) -> None:
    """Put the marking `forward` in place again, where unpickling has lost it."""
    _patch(module, _marked_forward)


def release_module(module: nn.Module) -> None:
    """Undo `bind_module`.

    Raises:
        AttachError: if something else has patched `forward` since.
    """
    if _unpatch(module, _marked_forward):
        delattr(module, POLICY)
        delattr(module, LAYER)


def bind_root(module: nn.Module) -> None:
    """Let a model's `forward` hand on the token grid that its call tells."""
    _patch(module, _root_forward)


def release_root(module: nn.Module) -> None:
    """Undo `bind_root`.

    Raises:
        AttachError: if something else has patched `forward` since.
    """
    _unpatch(module, _root_forward)


def is_bound(module: nn.Module) -> bool:
    """Whether a module emits a marker."""
    return _is_patched(module, _marked_forward)


def _marked_forward(class_forward: Any) -> Any:
    """Return a forward that emits a marker when it is traced."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            bind = torch.ops.compiled_sparse.bind
            bind(self.compiled_sparse_layer, [], self._compiled_sparse_policy)
        inner = self._compiled_sparse_inner
        if inner is None:
            return class_forward(self, *args, **kwargs)
        return inner(*args, **kwargs)

    return forward


def _root_forward(class_forward: Any) -> Any:
    """Return a forward under the metadata its own call tells."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self._compiled_sparse_inner
        if inner is None:
            inner = functools.partial(class_forward, self)
        if torch.compiler.is_compiling():
            _say_sizes(args, kwargs)
            return inner(*args, **kwargs)
        grid = read_grid(self, args, kwargs) if current_layout() is None else None
        with nullcontext() if grid is None else metadata(grid_thw=grid):
            return inner(*args, **kwargs)

    return forward


def _say_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Emit the grid of a traced call that names its sizes beside packed tokens, as LTX's does."""
    tokens = kwargs.get("hidden_states", args[0] if args else None)
    sizes = [kwargs.get(name) for name in _SIZES]
    if isinstance(tokens, Tensor) and all(isinstance(size, int) for size in sizes):
        torch.ops.compiled_sparse.bind_layout(tokens, sizes)


def _patch(module: nn.Module, factory: Any) -> None:
    if _is_patched(module, factory):
        return
    # An instance's own forward, such as a loader's hook, stays in force underneath.
    setattr(module, INNER, module.__dict__.get("forward"))
    cls: Any = type(module)
    module.__dict__["forward"] = types.MethodType(_for_class(cls, factory), module)


def _unpatch(module: nn.Module, factory: Any) -> bool:
    if not hasattr(module, INNER):
        return False
    if not _is_patched(module, factory):
        raise AttachError(
            "the module's forward was patched by something else after cs.attach",
            got=repr(module.__dict__.get("forward")),
            expected="the forward that cs.attach put there",
            next_step="remove the other patch first, then the handle",
        )
    inner = getattr(module, INNER)
    del module.__dict__["forward"]
    if inner is not None:
        module.__dict__["forward"] = inner
    delattr(module, INNER)
    return True


def _is_patched(module: nn.Module, factory: Any) -> bool:
    present = getattr(module.__dict__.get("forward"), "__func__", None)
    cls: Any = type(module)
    return getattr(present, "__code__", None) is _for_class(cls, factory).__code__


@functools.cache
def _for_class(cls: Any, factory: Any) -> Any:
    """Return the patched forward of a class, with the signature of its own.

    Its name makes a pickled module load with its plain forward, also where this package is missing.
    """
    forward = functools.update_wrapper(factory(cls.forward), cls.forward)
    forward.__name__ = "forward"
    return forward
