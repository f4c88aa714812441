"""Call-time values as graph inputs: placeholders behind those Dynamo made.

The backend's wrapper passes the tensors of the present call after the model's own inputs. Values
reach calls inside activation checkpointing as further operands of the checkpointed region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_sparse.metadata import CallMetadata
from compiled_sparse.metadata import current_call
from compiled_sparse.passes.fx import CHECKPOINT_OPS
from compiled_sparse.passes.fx import all_nested
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import submodule_of
from compiled_sparse.passes.sites import Site
from compiled_sparse.runtime import call_tensor
from compiled_sparse.windows import WindowTable


@dataclass(frozen=True)
class RuntimeInput:
    """One appended input.

    Args:
        name: "step", "sparsity" or "windows".
        device: Where its tensor lives.
        table: The table of windows, for "windows".
    """

    name: str
    device: torch.device
    table: WindowTable | None = None

    def tensor(self, call: CallMetadata) -> Tensor:
        """Return the tensor to pass in a call."""
        return call_tensor(self.name, call, self.device, self.table)


class RuntimeInputs:
    """The inputs appended to one graph, each once.

    Args:
        root: The graph module whose inputs they become; edited.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self._root = root
        self._nodes: dict[RuntimeInput, fx.Node] = {}
        self._entered: dict[tuple[fx.Node, fx.GraphModule], fx.Node] = {}
        self.edited: list[fx.GraphModule] = []

    @property
    def inputs(self) -> tuple[RuntimeInput, ...]:
        """What the wrapper must pass, in order."""
        return tuple(self._nodes)

    def can_reach(self, owner: fx.GraphModule) -> bool:
        """Whether a value can be handed from the root's inputs into a nested graph."""
        return owner is self._root or bool(checkpoint_calls(self._root, owner))

    def is_at_root(self, node: fx.Node) -> bool:
        """Whether a node is one of the root's graph, so that `reach` can hand it on."""
        return node.graph is self._root.graph

    def node(self, wanted: RuntimeInput, site: Site) -> fx.Node:
        """Return an input as a node of a site's graph.

        Args:
            wanted: The input.
            site: An attention call whose graph `can_reach` holds for.
        """
        if wanted not in self._nodes:
            real = wanted.tensor(current_call())
            fake = fake_mode_of(site).from_tensor(real, static_shapes=True)
            name = f"compiled_sparse_{wanted.name}_{len(self._nodes)}"
            placeholder = _append_placeholder(self._root, name, fake)
            placeholder._dynamo_source = None
            self._nodes[wanted] = placeholder
            self._changed(self._root)
        return self.reach(self._nodes[wanted], site.owner)

    def reach(self, node: fx.Node, owner: fx.GraphModule) -> fx.Node:
        """Hand a node of the root's graph through the calls that lead to a nested graph."""
        if owner is self._root:
            return node
        if (node, owner) not in self._entered:
            placeholder = _append_placeholder(owner, node.name, example_value(node))
            for call, parent in checkpoint_calls(self._root, owner):
                call.args = (*call.args, self.reach(node, parent))
                self._changed(parent)
            self._entered[node, owner] = placeholder
            self._changed(owner)
        return self._entered[node, owner]

    def _changed(self, owner: fx.GraphModule) -> None:
        if all(owner is not each for each in self.edited):
            self.edited.append(owner)


def fake_mode_of(site: Site) -> FakeTensorMode:
    """Return the mode of the fake tensors Dynamo recorded around a site."""
    query = site.tensor("query")
    assert isinstance(query, FakeTensor)
    return query.fake_mode


def _append_placeholder(owner: fx.GraphModule, name: str, value: Any) -> fx.Node:
    placeholders = [node for node in owner.graph.nodes if node.op == "placeholder"]
    first = next(iter(owner.graph.nodes))
    place = owner.graph.inserting_after(placeholders[-1]) if placeholders else None
    with place or owner.graph.inserting_before(first):
        placeholder = owner.graph.placeholder(name)
    placeholder.meta["example_value"] = value
    return placeholder


def checkpoint_calls(
    root: fx.GraphModule, owner: fx.GraphModule
) -> list[tuple[fx.Node, fx.GraphModule]]:
    """Return every checkpoint call of a nested graph with the graph module that makes it.

    Empty where the graph is also used otherwise, or its caller cannot be reached: then there is no
    telling what its operands are.
    """
    calls: list[tuple[fx.Node, fx.GraphModule]] = []
    for parent in (root, *all_nested(root)):
        for node in parent.graph.nodes:
            if submodule_of(node, parent) is not owner:
                continue
            for user in node.users:
                if not _is_plain_call(user, node):
                    return []
                calls.append((user, parent))
    reachable = all(parent is root or checkpoint_calls(root, parent) for _, parent in calls)
    return calls if reachable else []


def _is_plain_call(user: fx.Node, body: fx.Node) -> bool:
    """Whether a node checkpoints a region whose operands are all positional."""
    by_name = [value for value in user.kwargs.values() if isinstance(value, fx.Node)]
    return op_name(user) in CHECKPOINT_OPS and user.args[0] is body and not by_name
