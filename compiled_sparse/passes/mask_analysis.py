"""What every mask of a graph holds when it is used: a forward analysis of values.

Each tensor node gets a `MaskValue` or None, unknown. A boolean tensor is never quite unknown: its
own elements are bits. A write ends what was known of every view of the memory and of everything
that was described by what is written over. Knowledge is only ever lost, never invented.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from compiled_sparse.passes.fx import CHECKPOINT_OPS
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.fx import submodule_of
from compiled_sparse.passes.mask_values import Leaf
from compiled_sparse.passes.mask_values import MaskValue
from compiled_sparse.passes.mask_values import constant
from compiled_sparse.passes.mask_values import leaf_value
from compiled_sparse.passes.writes import is_trusted
from compiled_sparse.passes.writes import reached_by_writes
from compiled_sparse.passes.writes import shape_writes
from compiled_sparse.passes.writes import shared_at_run_time
from compiled_sparse.passes.writes import writes

MaskRule = Callable[["MaskAnalysis", fx.Node], "MaskValue | None"]

RULES: dict[str, MaskRule] = {}
WRITING_RULES: dict[str, MaskRule] = {}


def mask_rule(*names: str, writes: bool = False) -> Callable[[MaskRule], MaskRule]:
    """Register a rule for methods and torch functions of these names.

    Args:
        *names: Their names.
        writes: The rule says what the first argument holds after the operation wrote to it.
    """

    def register(function: MaskRule) -> MaskRule:
        for name in names:
            (WRITING_RULES if writes else RULES)[name] = function
        return function

    return register


def masks_at(
    owner: fx.GraphModule, mask_of: Callable[[fx.Node], Any]
) -> dict[fx.Node, MaskValue | None]:
    """Return what the mask of every attention call holds, checkpointed graphs included.

    Args:
        owner: Graph module as Dynamo hands it out, or its clone.
        mask_of: Returns the mask of an attention call, None for anything else.
    """
    analysis = MaskAnalysis(owner)
    # Tables are real tensors, computed while the graph is compiled.
    with unset_fake_temporarily(), torch.no_grad(), torch._C.DisableTorchFunction():
        analysis.run(mask_of)
    return analysis.at_sites


class MaskAnalysis:
    """The values of all nodes of one graph.

    Args:
        owner: Graph module as Dynamo hands it out, or its clone.
        outer: For a checkpointed graph, the analysis of the graph around it.
        arguments: For a checkpointed graph, what the outer graph passes to its placeholders.
    """

    def __init__(
        self,
        owner: fx.GraphModule,
        outer: MaskAnalysis | None = None,
        arguments: Sequence[Any] = (),
    ) -> None:
        self.owner = owner
        self.at_sites: dict[fx.Node, MaskValue | None] = {} if outer is None else outer.at_sites
        self.is_lost: bool = outer.is_lost if outer is not None else any(shape_writes(owner))
        self.outputs: Any = None
        self._shared: list[set[int]] = outer._shared if outer else shared_at_run_time(owner)
        self._outer = outer
        self._arguments = list(arguments)
        self._values: dict[fx.Node, MaskValue | None] = {}
        self._tuples: dict[fx.Node, list[MaskValue | None]] = {}

    def run(self, mask_of: Callable[[fx.Node], Any]) -> None:
        """Walk the graph and the checkpointed ones in it, and note the masks of sites.

        Args:
            mask_of: Returns the mask of an attention call, None for anything else.
        """
        for node in self.owner.graph.nodes:
            mask = mask_of(node)
            if isinstance(mask, fx.Node):
                self._note(node, self.of(mask))
            if node.op == "output":
                self.outputs = node.args[0]
            elif node.op == "call_function" and op_name(node) in CHECKPOINT_OPS:
                self._enter(node, mask_of)
            elif not self.is_lost:
                self._visit(node)

    def of(self, node: Any) -> MaskValue | None:
        """Return what a tensor node holds at this moment, None if that is unknown."""
        if not isinstance(node, fx.Node):
            return None
        if self.is_lost:
            return self.fresh(node)
        if node not in self._values:
            self._values[node] = self.fresh(node)
        return self._values[node]

    def element(self, node: fx.Node, index: int) -> MaskValue | None:
        """Return what one element of a tuple-valued node holds."""
        elements = self._tuples.get(node, [])
        return elements[index] if -len(elements) <= index < len(elements) else None

    def fresh(self, node: fx.Node, values: Sequence[Any] | None = None) -> MaskValue | None:
        """Return what is known of a tensor of which only the possible values are.

        Args:
            node: The tensor.
            values: The distinct values, None if unknown; those of booleans always are.
        """
        shape = shape_of(node)
        if shape is None:
            return None
        dtype = example_value(node).dtype
        if values is None:
            values = [False, True] if dtype == torch.bool else []
        if len(values) == 1:
            return constant(values[0], dtype)
        if len(values) != 2:
            return None
        live = [None if same(size, 1) else size for size in shape]
        return leaf_value(Leaf(node, values[1]), live, values)

    def _note(self, site: fx.Node, value: MaskValue | None) -> None:
        """Keep a site's mask; a graph that is run twice may have two, and then none is known."""
        self.at_sites[site] = None if site in self.at_sites else value

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = self._placeholder(node)
            return
        name, trusted = op_name(node), is_trusted(node)
        if trusted and name in WRITING_RULES:
            self._write(node, WRITING_RULES[name](self, node))
        elif trusted and name in RULES:
            value = RULES[name](self, node)
            self._values[node] = self.fresh(node) if value is None else value
        elif writes(node, self.owner):
            self._forget(node.all_input_nodes)

    def _placeholder(self, node: fx.Node) -> MaskValue | None:
        if self._outer is None or not self._arguments:
            return self.fresh(node)
        value = self._outer.of(self._arguments.pop(0))
        return self.fresh(node) if value is None else value

    def _write(self, node: fx.Node, value: MaskValue | None) -> None:
        """Set what the first argument holds after `node` wrote to it."""
        target = node.args[0] if node.args else None
        gone = self._forget([target] if isinstance(target, fx.Node) else node.all_input_nodes)
        if not isinstance(target, fx.Node) or self.is_lost:
            return
        if value is None or any(atom.leaf in gone for atom in value.atoms):
            value = self.fresh(target, _possible(value))
        self._values[target] = value
        if shape_of(node) is not None:
            self._values[node] = value

    def _forget(self, written: Sequence[fx.Node]) -> set[Leaf]:
        """Forget what these held, and what was said in terms of it; return the leaves gone."""
        own = {storage for node in written for storage in storage_of(node)}
        memory = reached_by_writes(own, self._shared)
        if not memory:
            return set()
        views = {view for storage in memory for view in self._by_storage.get(storage, ())}
        if self._outer is not None and any(n.op in ("placeholder", "get_attr") for n in views):
            self._lose()  # what the outer graph holds has changed too
            return set()
        leaves = {atom.leaf for value in self._values.values() if value for atom in value.atoms}
        gone = {leaf for leaf in leaves if storage_of(leaf.node) & memory}
        for other, value in list(self._values.items()):
            if other in views:
                self._values[other] = self.fresh(other)
            elif value is not None and any(atom.leaf in gone for atom in value.atoms):
                self._values[other] = self.fresh(other, _possible(value))
        self._tuples.clear()
        return gone

    @functools.cached_property
    def _by_storage(self) -> dict[int, list[fx.Node]]:
        nodes: dict[int, list[fx.Node]] = {}
        for node in self.owner.graph.nodes:
            for storage in storage_of(node):
                nodes.setdefault(storage, []).append(node)
        return nodes

    def _lose(self) -> None:
        self.is_lost = True
        if self._outer is not None:
            self._outer._lose()

    def _enter(self, node: fx.Node, mask_of: Callable[[fx.Node], Any]) -> None:
        submodule = submodule_of(node.args[0], self.owner) if node.args else None  # type: ignore[arg-type]
        if submodule is None:
            self._lose()
            return
        inner = MaskAnalysis(submodule, self, node.args[1:])
        inner.run(mask_of)
        results = inner.outputs if isinstance(inner.outputs, tuple | list) else ()
        self._tuples[node] = [self._visible_outside(inner, result) for result in results]

    def _visible_outside(self, inner: MaskAnalysis, result: Any) -> MaskValue | None:
        """What a checkpointed graph returns, unless it is said in terms of its own nodes."""
        value = inner.of(result)
        own = value is not None and any(
            atom.leaf.node.graph is inner.owner.graph for atom in value.atoms
        )
        return None if own else value


def _possible(value: MaskValue | None) -> list[Any] | None:
    return None if value is None or len(value.values) > 2 else value.values
