"""Checks of sparse calls as further outputs of a graph: what a guard reads."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from compiled_sparse.ops import guard as _op  # noqa: F401 - defines the op
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.runtime_inputs import checkpoint_calls


class Checks:
    """The checks written into one graph, handed out of nested graphs.

    Args:
        root: The graph module that gets the further outputs; edited.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self._root = root
        self.paths: list[str] = []
        self.edited: list[fx.GraphModule] = []

    def add(self, path: str, owner: fx.GraphModule, out: fx.Node, rows: int) -> None:
        """Check a sparse call's output; one in a graph that hands nothing out is not checked.

        Args:
            path: The module that made the call.
            owner: Graph module whose graph holds it.
            out: The output, first of what the mechanism's op returns.
            rows: How many query positions to compare.
        """
        call = out.args[0]
        assert isinstance(call, fx.Node)
        q, k, v, key_mask, *_, scale = call.args
        arguments = (q, k, v, out, key_mask, rows, scale)
        with owner.graph.inserting_after(out):
            statistics = owner.graph.call_function(
                torch.ops.compiled_sparse.guard_statistics.default, arguments
            )
        with example_value(out).fake_mode:
            statistics.meta["example_value"] = compute(statistics)
        self._hand_out(path, owner, statistics)

    def _hand_out(self, path: str, owner: fx.GraphModule, node: fx.Node) -> None:
        """Append a node to a graph's outputs, and to those of the graphs that call it."""
        calls = [] if owner is self._root else checkpoint_calls(self._root, owner)
        if owner is not self._root and not calls:
            owner.graph.erase_node(node)
            return
        index = _append_output(owner, node)
        self.edited.append(owner)
        if owner is self._root:
            self.paths.append(path)
        for call, parent in calls:
            value = example_value(node)
            call.meta["example_value"] = (*call.meta["example_value"], value)
            with parent.graph.inserting_after(call):
                item = parent.graph.call_function(operator.getitem, (call, index))
            item.meta["example_value"] = value
            self._hand_out(path, parent, item)


def _append_output(owner: fx.GraphModule, node: fx.Node) -> int:
    (output,) = (each for each in owner.graph.nodes if each.op == "output")
    given: Any = output.args[0]
    output.args = ((*given, node),)
    return len(given)
