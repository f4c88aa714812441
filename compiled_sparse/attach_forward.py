"""The patched `forward` of attached modules.

A patch is an instance attribute: a method over one function per class, with the class's own
signature. What belongs to the instance is read from its attributes, so that Dynamo shares one
compiled artifact among the blocks of a model.
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch import nn

from compiled_sparse import ops as _ops  # noqa: F401 - registers the markers
from compiled_sparse.attach_gates import GATE
from compiled_sparse.attach_gates import traced_gate
from compiled_sparse.attach_projections import PROJECTION
from compiled_sparse.attach_projections import traced_projection
from compiled_sparse.call_layout import read_grid
from compiled_sparse.errors import AttachError
from compiled_sparse.metadata import current_layout
from compiled_sparse.metadata import metadata

LAYER = "compiled_sparse_layer"
POLICY = "_compiled_sparse_policy"
INNER = "_compiled_sparse_inner"
NO_LAYER = (0,)
"""Shape of the layer buffer of a module that does not know its place in the model."""

LEARNED = (GATE, PROJECTION)
"""What a module may be given to learn."""

Names = tuple[str | None, ...]
"""Name of each of `LEARNED` that a module is to have."""

_SIZES = ("num_frames", "height", "width")


def bind_module(module: nn.Module, policy: str, layer: int | None, names: Names = ()) -> None:
    """Let a module's traced `forward` emit a marker: policy, layer index, and what it has learned.

    Args:
        module: The attention module.
        policy: JSON of its policy, or empty to follow the backend's options.
        layer: Index among the attention layers of the model; None where not known.
        names: Names of the layers it is to have; None leaves it the one it may have.
    """
    for learned, name in zip(LEARNED, names or (None,) * len(LEARNED), strict=True):
        learned.add(module, name)
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


def check_bindable(module: nn.Module, *, is_root: bool = False) -> None:
    """Check that a module can be bound, again too, without changing it.

    Args:
        module: An attention module, or the model.
        is_root: Whether it is for `bind_root`.

    Raises:
        AttachError: if something else has hidden the forward of an earlier attach.
    """
    place = _find(module, _root_forward if is_root else _marked_forward)
    allowed = tuple(each for each in _Place if each is not _Place.UNKNOWN)
    _require_place(module, place, allowed)


def check_releasable(module: nn.Module, *, is_root: bool = False) -> None:
    """Check that a module can be released, without changing it.

    Args:
        module: An attention module, or the model.
        is_root: Whether it is for `release_root`.

    Raises:
        AttachError: if something else has patched `forward` since.
    """
    place = _find(module, _root_forward if is_root else _marked_forward)
    _require_place(module, place, (_Place.ABSENT, _Place.GONE, _Place.TOP))


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
    return _find(module, _marked_forward) in (_Place.TOP, _Place.BENEATH)


def _marked_forward(class_forward: Any) -> Any:
    """Return a forward that emits a marker when it is traced."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _emit_marker(self, args, kwargs)
        inner = self._compiled_sparse_inner
        if inner is None:
            return class_forward(self, *args, **kwargs)
        return inner(*args, **kwargs)

    return forward


def _emit_marker(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gate = traced_gate(module, args, kwargs)
    bind = torch.ops.compiled_sparse.bind
    bind(
        module.compiled_sparse_layer,
        gate,
        module._compiled_sparse_gate[0],
        traced_projection(module),
        module._compiled_sparse_projection[0],
        module._compiled_sparse_policy,
    )


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
    if _find(module, factory) in (_Place.TOP, _Place.BENEATH):
        return
    # An instance's own forward, such as a loader's hook, stays in force underneath.
    setattr(module, INNER, module.__dict__.get("forward"))
    cls: Any = type(module)
    module.__dict__["forward"] = types.MethodType(_for_class(cls, factory), module)


def _unpatch(module: nn.Module, factory: Any) -> bool:
    place = _find(module, factory)
    _require_place(module, place, (_Place.ABSENT, _Place.GONE, _Place.TOP))
    if place is _Place.ABSENT:
        return False
    if place is _Place.TOP:
        inner = getattr(module, INNER)
        del module.__dict__["forward"]
        if inner is not None:
            module.__dict__["forward"] = inner
    delattr(module, INNER)
    return True


class _Place(Enum):
    """Where the patched forward of a module is."""

    ABSENT = "never patched"
    TOP = "called first"
    BENEATH = "under the wrapper of something else"
    GONE = "taken away by something that put an older forward back"
    UNKNOWN = "out of sight"


def _find(module: nn.Module, factory: Any) -> _Place:
    if not hasattr(module, INNER):
        return _Place.ABSENT
    cls: Any = type(module)
    ours = _for_class(cls, factory).__code__
    top = module.__dict__.get("forward")
    if _code(top) is ours:
        return _Place.TOP
    beneath = [_code(each) for each in _wrapped(top, module.__dict__.get("_old_forward"))]
    if any(code is ours for code in beneath):
        return _Place.BENEATH
    is_older = top is None or top == getattr(module, INNER)
    reaches_class = any(code is _code(cls.forward) for code in beneath)
    return _Place.GONE if is_older or reaches_class else _Place.UNKNOWN


def _wrapped(*wrappers: Any) -> list[Any]:
    """Return wrappers and all they say they wrap, as accelerate, partial and functools.wraps do."""
    seen: dict[int, Any] = {}
    rest = [each for each in wrappers if each is not None]
    while rest:
        each = rest.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        names = ("__wrapped__", "func", "__func__")
        rest += [getattr(each, name) for name in names if callable(getattr(each, name, None))]
    return list(seen.values())


def _code(function: Any) -> Any:
    return getattr(getattr(function, "__func__", function), "__code__", None)


def _require_place(module: nn.Module, place: _Place, allowed: tuple[_Place, ...]) -> None:
    if place not in allowed:
        kind = type(module.__dict__.get("forward")).__name__
        raise AttachError(
            "the module's forward was patched by something else after cs.attach",
            got=f"a {kind} on {type(module).__name__}; the forward of cs.attach is {place.value}",
            expected="the forward that cs.attach put there",
            next_step="remove the other patch first, then what cs.attach did",
        )


@functools.cache
def _for_class(cls: Any, factory: Any) -> Any:
    """Return the patched forward of a class, with the signature of its own.

    Its name makes a pickled module load with its plain forward, also where this package is missing.
    """
    forward = functools.update_wrapper(factory(cls.forward), cls.forward)
    forward.__name__ = "forward"
    return forward
