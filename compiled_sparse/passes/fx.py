"""Small verbs on FX graphs shared by the passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import statically_known_true

_SELF = re.compile(r"^L\['[^']*'\](?:\.__self__)?")
_MODULES = re.compile(r"(?:\.__dict__)?\['_modules'\]|\._modules")
_HOOK = re.compile(r"\.forward\.func\.__closure__\[\d+\]\.cell_contents")
_KEY = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")
_GETATTR = re.compile(r"getattr\((.*), '([^']*)'\)")

MODULE_STATE = "compiled_sparse_module_state"
"""Marks, in a node's meta, an exported program's placeholder for a module's own tensor."""

CHECKPOINT_OPS = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap"})


def example_value(node: fx.Node) -> Any:
    """Return the fake value Dynamo or `torch.export` recorded for a node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return a node's tensor shape (integers or SymInts), or None if it is no tensor."""
    value = example_value(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def storage_of(node: fx.Node) -> set[int]:
    """Return the identities of the memory behind a node's tensors; views share their base's."""
    value = example_value(node)
    tensors = value if isinstance(value, tuple | list) else (value,)
    plain = [_without_transforms(t) for t in tensors if isinstance(t, torch.Tensor)]
    return {t.untyped_storage()._cdata for t in plain if torch._C._has_storage(t)}


def _without_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor inside `vmap` and its like."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are provably equal; adds no guard."""
    return bool(statically_known_true(left == right))


def size_key(size: Any) -> Any:
    """Return something hashable that is equal for equal sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def hint(size: Any) -> int:
    """Return the example value of a size without adding a guard."""
    if isinstance(size, torch.SymInt):
        node_hint = size.node.hint
        return int(node_hint) if node_hint is not None else -1
    return int(size)


def op_name(node: fx.Node) -> str:
    """Return the method's or function's plain name, e.g. `permute`."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        return node.target._schema.name.removeprefix("aten::")
    return str(getattr(node.target, "__name__", node.target))


def call(function: Any, *arguments: Any) -> fx.Node:
    """Put a call at the insertion point of a graph, with its example value.

    Args:
        function: What is called.
        arguments: What with; the graph is that of the first node, which must be one of them.
    """
    graph = next(argument.graph for argument in arguments if isinstance(argument, fx.Node))
    node = graph.call_function(function, arguments)
    node.meta["example_value"] = compute(node)
    return node


def compute(node: fx.Node) -> Any:
    """Return what a call or method gives for the example values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), example_value)
    # A checkpoint around the compiled region counts what is saved for backward: not this.
    with saved_tensors_hooks(_unchanged, _unchanged):
        return run(node, args, kwargs)


def run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return what a call or method gives for these arguments instead of its own."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _unchanged(saved: Any) -> Any:
    return saved


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes an operation is handed."""
    return node.all_input_nodes


def walk(
    start: fx.Node,
    following: Callable[[fx.Node], Iterable[fx.Node]],
    is_end: Callable[[fx.Node], bool] = lambda _: False,
) -> Iterator[fx.Node]:
    """Yield a node and all that can be reached from it, each once.

    Args:
        start: Where the walk begins.
        following: Returns where it goes on from a node.
        is_end: Whether it goes no further from a node.
    """
    seen: set[fx.Node] = set()
    rest = [start]
    while rest:
        node = rest.pop()
        if node not in seen:
            seen.add(node)
            yield node
            rest += () if is_end(node) else following(node)


def between(
    source: fx.Node,
    result: fx.Node,
    inputs: Callable[[fx.Node], Iterable[fx.Node]] = inputs_of,
) -> set[fx.Node]:
    """Return what leads from one node to another, the last included; empty if nothing does.

    Args:
        source: The first node, not among those returned.
        result: The last.
        inputs: Returns what a node is computed from.
    """
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in walk(result, inputs, lambda each: each is source):
        for each in inputs(node):
            users.setdefault(each, []).append(node)
    return set(walk(source, lambda each: users.get(each, ()))) - {source}


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module a node was called in, e.g. `blocks.0.attn1`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    while match := _GETATTR.fullmatch(path):
        path = f"{match[1]}.{match[2]}"
    # A module with a hook on its forward is seen through it, and so is the second call of an
    # attached one.
    path = _MODULES.sub("", _SELF.sub("", _HOOK.sub("", path))).replace(".forward.__self__", "")
    return _KEY.sub(r".\1", path).strip(".")


def submodule_of(node: fx.Node, owner: fx.GraphModule) -> fx.GraphModule | None:
    """Return the graph module a `get_attr` node fetches, or None if it fetches something else."""
    if node.op != "get_attr":
        return None
    value: Any = owner
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, fx.GraphModule) else None


def nested_graphs(owner: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Yield each `get_attr` node that fetches a graph module, and that module."""
    for node in owner.graph.nodes:
        submodule = submodule_of(node, owner)
        if submodule is not None:
            yield node, submodule


def all_nested(owner: fx.GraphModule) -> list[fx.GraphModule]:
    """Return the graph modules nested in one, at any depth."""
    return [each for _, inner in nested_graphs(owner) for each in (inner, *all_nested(inner))]


def clone_dynamo_graph(owner: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph Dynamo handed out, nested graph modules included, ready to be edited.

    Dynamo reads its own graph again after the backend returns, so it must stay untouched; the inner
    compilers in turn need the attributes Dynamo left on placeholders and on the module.

    Args:
        owner: Dynamo's graph module; not modified.

    Returns:
        A module with the same parameters and an independent graph.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in owner.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    clone = fx.GraphModule(owner, graph, class_name=type(owner).__name__)
    clone.meta = dict(owner.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(owner, name):
            setattr(clone, name, getattr(owner, name))
    for node, submodule in nested_graphs(owner):
        setattr(clone, str(node.target), clone_dynamo_graph(submodule))
    return clone
