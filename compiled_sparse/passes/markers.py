"""Markers in a graph: what attached modules say about themselves and about the call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.ops import bind as _bind  # noqa: F401 - registers the ops
from compiled_sparse.passes.fx import all_nested
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import module_path
from compiled_sparse.passes.fx import size_key
from compiled_sparse.policy import Policy

_OPS = torch.ops.compiled_sparse
_BIND = (_OPS.bind, _OPS.bind.default)
_BIND_LAYOUT = (_OPS.bind_layout, _OPS.bind_layout.default)


@dataclass(frozen=True)
class Gate:
    """A module's learned gate.

    Args:
        name: The gate's name in the module.
        value: What it made of an argument of the module; None where none fits.
        source: That argument.
        given: All arguments that fit.
    """

    name: str
    value: fx.Node | None = None
    source: fx.Node | None = None
    given: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Projection:
    """A module's learned projection.

    Args:
        name: The projection's name in the module.
        weight: [out, in], as of `nn.Linear`.
        bias: [out], or None.
    """

    name: str
    weight: fx.Node
    bias: fx.Node | None = None


@dataclass(frozen=True)
class Marker:
    """What one attached module says.

    Args:
        owner: Graph module whose graph holds it.
        position: How many nodes come before it there.
        path: Dotted path of the module.
        policy: The module's own policy, if it has one.
        layer: The tensor with its layer index; None where it does not know its place.
        gate: The module's learned gate, if it has one.
        projection: The module's learned projection, if it has one.
    """

    owner: fx.GraphModule
    position: int
    path: str
    policy: Policy | None
    layer: fx.Node | None
    gate: Gate | None = None
    projection: Projection | None = None

    def covers(self, path: str) -> bool:
        """Whether a call at `path` is made by this module or by one inside it."""
        return path == self.path or not self.path or path.startswith(self.path + ".")


class Markers:
    """All markers of a graph and of the graphs nested in it.

    `grid` is the token grid that a traced model's call named, integers or SymInts, or None.

    Args:
        owner: Graph module as Dynamo hands it out, or its clone.
    """

    def __init__(self, owner: fx.GraphModule) -> None:
        self._nodes: list[tuple[fx.GraphModule, fx.Node]] = []
        self._positions: dict[fx.Node, int] = {}
        modules = []
        for graph in (owner, *all_nested(owner)):
            for position, node in enumerate(graph.graph.nodes):
                self._positions[node] = position
                if _is_marker(node):
                    self._nodes.append((graph, node))
                if node.target in _BIND:
                    modules.append(_read(graph, position, node))
        self.modules = tuple(modules)
        self.grid = _common_grid(node for _, node in self._nodes if node.target in _BIND_LAYOUT)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The modules' own policies, each once."""
        own = (marker.policy for marker in self.modules if marker.policy is not None)
        return tuple(dict.fromkeys(own))

    def covering(self, node: fx.Node, path: str) -> Marker | None:
        """Return the marker that speaks for an attention call, or None.

        It is the innermost module's; of a module called several times, that of the last call before
        the node.

        Args:
            node: The attention call.
            path: Its module path.
        """
        position = self._positions[node]
        around = [
            marker
            for marker in self.modules
            if marker.covers(path)
            and (marker.owner.graph is not node.graph or marker.position < position)
        ]
        return max(around, key=lambda m: _nearness(m, node), default=None)

    def erase(self) -> list[fx.GraphModule]:
        """Remove all markers; return the graph modules that changed and need recompiling."""
        for _, node in self._nodes:
            node.graph.erase_node(node)
        return [owner for owner, _ in self._nodes]


def _nearness(marker: Marker, node: fx.Node) -> tuple[int, bool, int]:
    """Positions in other graphs say nothing beside those in the node's own."""
    return len(marker.path), marker.owner.graph is node.graph, marker.position


def _is_marker(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (*_BIND, *_BIND_LAYOUT)


def _read(owner: fx.GraphModule, position: int, node: fx.Node) -> Marker:
    arguments: Any = node.args
    layer, gate, gate_name, projection, projection_name, document = arguments
    policy = Policy.from_json(str(document)) if document else None
    place = layer if example_value(layer).dim() == 0 else None
    value, source, *given = gate or (None, None)
    weighing = Gate(str(gate_name), value, source, tuple(given)) if gate_name else None
    projecting = Projection(str(projection_name), *projection) if projection_name else None
    return Marker(owner, position, module_path(node), policy, place, weighing, projecting)


def _common_grid(said: Iterable[fx.Node]) -> tuple[Any, ...] | None:
    """Two calls that name different grids are two models in one graph: neither is believed."""
    sizes: list[Any] = [node.args[1] for node in said]
    values = [tuple(map(_value, grid)) for grid in sizes]
    grids = {tuple(map(size_key, grid)): grid for grid in values}
    return next(iter(grids.values())) if len(grids) == 1 else None


def _value(size: Any) -> Any:
    return example_value(size) if isinstance(size, fx.Node) else size
