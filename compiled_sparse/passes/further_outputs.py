"""Values handed out of a graph as further outputs, out of the graphs nested in it, too."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.runtime_inputs import checkpoint_calls


class FurtherOutputs:
    """The outputs appended to one graph, each with a label.

    Args:
        root: The graph module that gets them; edited.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self._root = root
        self.labels: list[Any] = []
        self.edited: list[fx.GraphModule] = []

    def hand_out(self, label: Any, owner: fx.GraphModule, node: fx.Node) -> None:
        """Append a node to a graph's outputs, and to those of the graphs that call it.

        Nothing is handed out of a graph whose callers cannot be reached: the node is erased.

        Args:
            label: What is kept in `labels` in its place.
            owner: Graph module whose graph holds the node.
            node: The node.
        """
        calls = [] if owner is self._root else checkpoint_calls(self._root, owner)
        if owner is not self._root and not calls:
            owner.graph.erase_node(node)
            return
        index = _append_output(owner, node)
        self.edited.append(owner)
        if owner is self._root:
            self.labels.append(label)
        for call, parent in calls:
            value = example_value(node)
            call.meta["example_value"] = (*call.meta["example_value"], value)
            with parent.graph.inserting_after(call):
                item = parent.graph.call_function(operator.getitem, (call, index))
            item.meta["example_value"] = value
            self.hand_out(label, parent, item)


def _append_output(owner: fx.GraphModule, node: fx.Node) -> int:
    (output,) = (each for each in owner.graph.nodes if each.op == "output")
    given: Any = output.args[0]
    output.args = ((*given, node),)
    return len(given)
