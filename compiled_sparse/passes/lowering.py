"""Calls in a graph written as the aten calls they make."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from compiled_sparse.passes.fx import all_nested
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import run


def lower_einops(owner: fx.GraphModule) -> list[fx.GraphModule]:
    """Write calls of einops, which Dynamo keeps whole before torch 2.12, as aten calls.

    Args:
        owner: A graph module that may be edited.

    Returns:
        The graph modules that changed and need recompiling.
    """
    changed = []
    for module in (owner, *all_nested(owner)):
        found = [node for node in module.graph.nodes if _is_einops(node)]
        for node in found:
            lower_to_aten(node)
        changed += [module] if found else []
    return changed


def _is_einops(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return (
        node.op == "call_function"
        and module.partition(".")[0] == "einops"
        and isinstance(example_value(node), FakeTensor)
    )


def lower_to_aten(node: fx.Node) -> None:
    """Replace a method, Python operator or function by the aten calls it makes.

    Args:
        node: The call; its value is one tensor.
    """
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        return run(node, *fx.node.map_arg((node.args, node.kwargs), given.__getitem__))

    with example_value(node).fake_mode:
        traced = make_fx(call, pre_dispatch=True)(*map(example_value, inputs))
    copies: dict[fx.Node, Any] = {}
    given = iter(inputs)
    with node.graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                copies[each] = next(given)
            elif each.op == "output":
                node.replace_all_uses_with(copies[each.args[0]])
            else:
                copies[each] = node.graph.node_copy(each, copies.__getitem__)
    node.graph.erase_node(node)
