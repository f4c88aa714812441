"""Which tokens are video: a forward analysis of tensor dimensions over a Dynamo graph.

Every node gets a track per dimension (`compiled_sparse.passes.tracks`). An op without a rule starts
new tracks, so knowledge is only ever lost, never invented. A write the analysis cannot follow ends
it: every attention call after it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.fx import CHECKPOINT_OPS
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import submodule_of
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import constant_tracks
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import stream

TrackValue = Any  # Tracks of a tensor, a list of TrackValues for a tuple, or None
Rule = Callable[["Provenance", fx.Node], TrackValue]

RULES: dict[str, Rule] = {}

_TRUSTED_MODULES = ("torch", "_operator", "operator")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for methods and torch functions of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Visit:
    """One node with what was known when it ran.

    Args:
        node: The node.
        owner: The graph module whose graph holds it.
        depth: 0 in the outermost graph.
        analysis: The analysis of that graph, at this moment.
    """

    node: fx.Node
    owner: fx.GraphModule
    depth: int
    analysis: Provenance


class Provenance:
    """Tracks of all nodes of one graph.

    Args:
        owner: Graph module as Dynamo hands it out.
        seeds: Tracks of the placeholders, for a nested graph.
        depth: Nesting depth of the graph.
    """

    def __init__(
        self, owner: fx.GraphModule, seeds: list[TrackValue] | None = None, depth: int = 0
    ) -> None:
        self.owner = owner
        self.depth = depth
        self.lost_at: fx.Node | None = None
        self.num_video_sources = 0
        self.outputs: TrackValue = None
        self._seeds = list(seeds or [])
        self._values: dict[fx.Node, TrackValue] = {}

    def run(self) -> Iterator[Visit]:
        """Walk the graph, yielding each node before its own rule is applied."""
        for node in self.owner.graph.nodes:
            yield Visit(node, self.owner, self.depth, self)
            if node.op == "output":
                self.outputs = self._outputs(node.args[0])
            elif node.op == "call_function" and op_name(node) in CHECKPOINT_OPS:
                yield from self._enter(node)
            else:
                self._values[node] = self._visit(node)

    def of(self, node: Any) -> Tracks:
        """Return the tracks of a tensor node; unknown ones are new streams."""
        value = self._values.get(node) if self.lost_at is None else None
        return value if isinstance(value, tuple) else self.fresh(node)

    def outputs_of(self, node: fx.Node, index: int) -> TrackValue:
        """Return the tracks of one element of a tuple-valued node."""
        value = self._values.get(node)
        if not isinstance(value, list) or not -len(value) <= index < len(value):
            return None
        return value[index]

    def is_tuple(self, node: fx.Node) -> bool:
        """Whether a node's value is a tuple or list of tensors."""
        return isinstance(example_value(node), tuple | list)

    def fresh(self, node: Any) -> Tracks:
        """Return tracks no other node shares."""
        shape = shape_of(node) if isinstance(node, fx.Node) else None
        return tuple(stream(size, (node, i)) for i, size in enumerate(shape or ()))

    def set(self, node: fx.Node, tracks: Tracks) -> None:
        """Replace the tracks of a node that was written to."""
        self._values[node] = tracks

    def lose(self, node: fx.Node) -> None:
        """Give up: `node` wrote something that cannot be followed."""
        self.lost_at = self.lost_at or node

    def _visit(self, node: fx.Node) -> TrackValue:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            shape = shape_of(node)
            return constant_tracks(shape) if shape is not None else None
        apply = RULES.get(op_name(node)) if _is_trusted(node) else None
        if apply is None:
            self._notice_writes(node)
        elif (value := apply(self, node)) is not None:
            return value
        shape = shape_of(node)
        if shape is not None and self._only_constants(node):
            return constant_tracks(shape)
        return None

    def _notice_writes(self, node: fx.Node) -> None:
        name = op_name(node)
        schema = getattr(node.target, "_schema", None)
        writes = name.endswith("_") and not name.endswith("__")
        if writes or "out" in node.kwargs or (schema is not None and schema.is_mutable):
            self.lose(node)

    def _placeholder(self, node: fx.Node) -> TrackValue:
        if self._seeds:
            return self._seeds.pop(0)
        shape = shape_of(node)
        if shape is None:
            return None
        return constant_tracks(shape) if _is_state(node) else self.fresh(node)

    def _only_constants(self, node: fx.Node) -> bool:
        inputs = [n for n in node.all_input_nodes if shape_of(n) is not None]
        return all(is_constant(track) for n in inputs for track in self.of(n))

    def _enter(self, node: fx.Node) -> Iterator[Visit]:
        submodule = submodule_of(node.args[0], self.owner) if node.args else None  # type: ignore[arg-type]
        if submodule is None:
            return
        seeds = [self._values.get(arg) for arg in node.args[1:]]  # type: ignore[arg-type]
        inner = Provenance(submodule, seeds, self.depth + 1)
        inner.lost_at = self.lost_at
        inner.num_video_sources = self.num_video_sources
        yield from inner.run()
        self.lost_at = inner.lost_at
        self.num_video_sources = inner.num_video_sources
        self._values[node] = inner.outputs

    def _outputs(self, result: Any) -> TrackValue:
        if isinstance(result, tuple | list):
            return [self._outputs(item) for item in result]
        return self._values.get(result) if isinstance(result, fx.Node) else None


def _is_trusted(node: fx.Node) -> bool:
    """A user's function may share a torch function's name; only torch's own have rules."""
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None) or type(node.target).__module__
    return str(module).split(".")[0] in _TRUSTED_MODULES


def _is_state(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer: the same for every call."""
    if isinstance(example_value(node), torch.nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None)
    name = "" if source is None else str(getattr(source, "name", ""))
    return "_parameters" in name or "_buffers" in name
