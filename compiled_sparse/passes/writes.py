"""Which operations may write into what they are handed, as far as a graph shows.

What is not known to leave its inputs alone counts as a write.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from collections.abc import Sequence
from types import BuiltinFunctionType
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._ops import OpOverload
from torch._ops import OpOverloadPacket

from compiled_sparse.ops import ring_shapes as _ring  # noqa: F401 - defines ops
from compiled_sparse.ops import ulysses as _ulysses  # noqa: F401 - defines ops
from compiled_sparse.passes.fx import CHECKPOINT_OPS
from compiled_sparse.passes.fx import all_nested
from compiled_sparse.passes.fx import nested_graphs
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.fx import submodule_of

_OPS = torch.ops.compiled_sparse
_TORCH_MODULES = ("torch", "_operator", "operator")
_DYNAMO = ["torch", "_dynamo"]
_OPERATIONS = OpOverload | OpOverloadPacket
_IN_PLACE_NAME = re.compile(r".*[^_]_|__(?:i[a-z]+|setitem)__")
_WRITING_NAMES = frozenset({"triton_kernel_wrapper_mutation"})
_WRITING_OPTIONS = ("out", "inplace", "max_norm")
_DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
    | {"alpha_dropout", "feature_alpha_dropout"}
)
_SHAPE_WRITES = frozenset(
    {"as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_"}
    | {"t_", "transpose_", "unsqueeze_"}
)
_WRITING_OPERATORS = frozenset(
    {"setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"}
    | {"imatmul", "iand", "ior", "ixor", "ilshift", "irshift", "iconcat"}
)


def writes(node: fx.Node, owner: fx.GraphModule) -> bool:
    """Whether an op may write into its inputs, itself or in a graph that it runs.

    Args:
        node: The operation.
        owner: The graph module whose graph holds it.
    """
    graphs = [g for each in node.all_input_nodes if (g := submodule_of(each, owner)) is not None]
    if isinstance(node.target, HigherOrderOperator) and not graphs:
        return True  # it runs something no graph shows
    return may_write(node) or any(map(_writes_inside, graphs))


def _writes_inside(owner: fx.GraphModule) -> bool:
    return any(writes(node, owner) for node in owner.graph.nodes)


def may_write(node: fx.Node) -> bool:
    """Whether an op may write into its inputs, by its schema, name, options or origin."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    name = op_name(node)
    if any(_option(node, option) is not None for option in _WRITING_OPTIONS):
        return True
    if name in _WRITING_NAMES or _has_mutable_schema(node.target):
        return True
    if _module_of(node) in ("_operator", "operator"):
        return name in _WRITING_OPERATORS
    if not _is_torch(node) and not isinstance(node.target, _OPERATIONS | BuiltinFunctionType):
        return True
    return _IN_PLACE_NAME.fullmatch(name) is not None


def shared_at_run_time(owner: fx.GraphModule) -> list[set[int]]:
    """Return sets of memory that may be one at run time, although no fake tensors share it.

    Dropout that drops nothing returns its input itself.

    Args:
        owner: The graph module; the graphs nested in it count too.
    """
    groups: list[set[int]] = []
    modules = (owner, *all_nested(owner))
    for node in (node for module in modules for node in module.graph.nodes):
        if _may_return_its_input(node):
            memory = {s for each in (node, *node.all_input_nodes) for s in storage_of(each)}
            group = reached_by_writes(memory, groups)
            groups = [*(other for other in groups if not other & group), group]
    return groups


def _may_return_its_input(node: fx.Node) -> bool:
    """Whether a result may share memory of which its fake tensor says nothing.

    Those of checkpoints are the fake tensors of the graphs inside.
    """
    name = op_name(node)
    runs_others = isinstance(node.target, HigherOrderOperator) and name not in CHECKPOINT_OPS
    return name in _DROPOUTS or runs_others


def reached_by_writes(memory: set[int], groups: Sequence[set[int]]) -> set[int]:
    """Return all memory that a write to some of it may reach.

    Args:
        memory: What is written to.
        groups: As `shared_at_run_time` returns them.
    """
    return memory.union(*(group for group in groups if group & memory))


def shape_writes(owner: fx.GraphModule) -> Iterator[fx.Node]:
    """Writes that change a tensor's shape in place.

    Dynamo records one value per tensor, so that even the nodes before such a write show the shape
    it has after it.
    """
    for node in owner.graph.nodes:
        if op_name(node).split(".")[0] in _SHAPE_WRITES:
            yield node
    for _, submodule in nested_graphs(owner):
        yield from shape_writes(submodule)


def is_trusted(node: fx.Node) -> bool:
    """Whether a name means what it means in torch.

    A user's function or custom op may share a torch function's name. A result written to `out=`
    needs no rule: the write ends the analysis.
    """
    if _option(node, "out") is not None:
        return False
    if isinstance(node.target, _OPERATIONS):
        return node.target in _followed() or _module_of(node).split(".")[:3] == [
            "torch",
            "_ops",
            "aten",
        ]
    return _is_torch(node)


@functools.cache
def _followed() -> tuple[OpOverload, ...]:
    """Ops of this package that move tokens and have rules."""
    return (
        _OPS.scatter_heads.default,
        _OPS.gather_heads.default,
        _OPS.ring_whole.default,
        _OPS.ring_own.default,
    )


def _option(node: fx.Node, name: str) -> Any:
    """An option of a call, by name or by position; None where it is off."""
    names = _parameters(node.target) if isinstance(node.target, FunctionType) else ()
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return None if given.get(name) is False else given.get(name)


@functools.cache
def _parameters(function: FunctionType) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _has_mutable_schema(target: Any) -> bool:
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _module_of(node: fx.Node) -> str:
    return str(getattr(node.target, "__module__", None) or type(node.target).__module__)


def _is_torch(node: fx.Node) -> bool:
    """Whether an op is torch's own; Dynamo's wrappers stand for what numpy functions do."""
    if node.op == "call_method":
        return True
    module = _module_of(node).split(".")
    return module[0] in _TORCH_MODULES and module[:2] != _DYNAMO
