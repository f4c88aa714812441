"""Which tokens are video: a forward analysis of tensor dimensions over a Dynamo graph.

Every node gets a track per dimension (`compiled_sparse.passes.tracks`). An op without a rule starts
new tracks, so knowledge is only ever lost, never invented. A write the analysis cannot follow ends
it: every attention call after it is unknown.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.fx import CHECKPOINT_OPS
from compiled_sparse.passes.fx import MODULE_STATE
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.fx import submodule_of
from compiled_sparse.passes.op_names import MIXING
from compiled_sparse.passes.picks import Pick
from compiled_sparse.passes.picks import own_picks
from compiled_sparse.passes.picks import source_of
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import axis_track
from compiled_sparse.passes.tracks import constant_tracks
from compiled_sparse.passes.tracks import is_bare
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import latent_axes
from compiled_sparse.passes.tracks import stream
from compiled_sparse.passes.tracks import track_size
from compiled_sparse.passes.writes import is_trusted
from compiled_sparse.passes.writes import reached_by_writes
from compiled_sparse.passes.writes import shape_writes
from compiled_sparse.passes.writes import shared_at_run_time
from compiled_sparse.passes.writes import writes

TrackValue = Any  # Tracks of a tensor, a list of TrackValues for a tuple, or None
Rule = Callable[["Provenance", fx.Node], TrackValue]

RULES: dict[str, Rule] = {}

_LATENT_RANKS = (4, 5)
_STATE_NAME = re.compile(r"\b_(?:parameters|buffers|modules)(?:'\])?\[")


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
        analysis: The analysis of that graph, at this moment.
    """

    node: fx.Node
    owner: fx.GraphModule
    analysis: Provenance


class Provenance:
    """Tracks of all nodes of one graph.

    Args:
        owner: Graph module as Dynamo hands it out.
        outer: For a nested graph, the analysis of the graph around it.
        arguments: For a nested graph, what the outer graph passes to its placeholders.
    """

    def __init__(
        self, owner: fx.GraphModule, outer: Provenance | None = None, arguments: Sequence[Any] = ()
    ) -> None:
        self.owner = owner
        self.lost_at: fx.Node | None = None if outer is None else outer.lost_at
        self.num_video_sources: int = 0 if outer is None else outer.num_video_sources
        self.outputs: TrackValue = None
        self._outer = outer
        self._arguments = list(arguments)
        self._values: dict[fx.Node, TrackValue] = {}
        self._by_storage: dict[int, list[fx.Node]] = {}
        self._shared: list[set[int]] = outer._shared if outer else shared_at_run_time(owner)
        self._from_video: set[fx.Node] = set()
        self._picks: dict[fx.Node, frozenset[Pick]] = {}

    def run(self) -> Iterator[Visit]:
        """Walk the graph, yielding each node before its own rule is applied."""
        if self._outer is None:
            self.lost_at = next(shape_writes(self.owner), None)
        for node in self.owner.graph.nodes:
            yield Visit(node, self.owner, self)
            if node.op == "output":
                self.outputs = self._outputs(node.args[0])
            elif node.op == "call_function" and op_name(node) in CHECKPOINT_OPS:
                yield from self._enter(node)
            else:
                self._values[node] = self._fitting(node, self._visit(node))
            for storage in storage_of(node):
                self._by_storage.setdefault(storage, []).append(node)
            if any(self.is_from_video(argument) for argument in node.all_input_nodes):
                self._from_video.add(node)
            self._note_picks(node)

    @functools.cached_property
    def writers(self) -> list[fx.Node]:
        """The graph's operations that may write into their inputs; add those inserted later."""
        return [node for node in self.owner.graph.nodes if writes(node, self.owner)]

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

    def start_video(self, node: fx.Node) -> None:
        """Note that `node` is a patch embedding."""
        self.num_video_sources += 1
        self._from_video.add(node)

    def is_from_video(self, node: Any) -> bool:
        """Whether a node was computed from a patch embedding, however its tokens were moved."""
        return node in self._from_video

    def picks_of(self, node: Any) -> frozenset[Pick]:
        """Return what was picked from batch dimensions on the way to a node."""
        return self._picks.get(node, frozenset())

    def _note_picks(self, node: fx.Node) -> None:
        picks = frozenset[Pick]().union(*map(self.picks_of, node.all_input_nodes))
        source = source_of(node)
        if source is not None and shape_of(node) is not None:
            picks |= frozenset(own_picks(node, self.of(source), self.of(node)))
        if picks:
            self._picks[node] = picks

    def overwrite(self, node: fx.Node, target: fx.Node, tracks: Tracks) -> None:
        """Replace the tracks of a tensor that `node` wrote to.

        What was known of other views of the same memory no longer holds: from now on they go by
        names nothing had before the write.
        """
        views = self._views([target])
        aliases = [view for view in views if view is not target]
        if self.is_from_video(node) or any(map(self.is_from_video, node.all_input_nodes)):
            self._from_video.update([target, *aliases])
        if tracks == self.of(target):
            return
        if self._outer is not None and any(view.op == "placeholder" for view in views):
            self.lose(node)  # what the outer graph holds has changed too
        for other in aliases:
            self._values[other] = _new_names(node, other)
            if _is_same_view(other, target):
                self._values[other] = tracks
        self._values[target] = tracks

    def _views(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return all nodes so far that may change when the memory of these is written to."""
        memory = {storage for node in nodes for storage in storage_of(node)}
        reached = reached_by_writes(memory, self._shared)
        views = [view for storage in reached for view in self._by_storage.get(storage, ())]
        return list(dict.fromkeys(views))

    def lose(self, node: fx.Node) -> None:
        """Give up: `node` wrote something that cannot be followed."""
        self.lost_at = self.lost_at or node

    def _visit(self, node: fx.Node) -> TrackValue:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            shape = shape_of(node)
            return constant_tracks(shape) if shape is not None else None
        apply = RULES.get(op_name(node)) if is_trusted(node) else None
        if apply is None:
            self._notice_writes(node)
        elif (value := apply(self, node)) is not None:
            return self._named(node, value) if op_name(node) in MIXING else value
        shape = shape_of(node)
        if shape is not None and self._only_constants(node):
            return constant_tracks(shape)
        return None

    def _named(self, node: fx.Node, value: TrackValue) -> TrackValue:
        """Name dimensions that came from a constant factor: they hold sums over others'."""
        if not isinstance(value, tuple) or self._only_constants(node):
            return value
        return tuple(
            stream(track_size(track), (node, dim))
            if is_bare(track) and not same(track_size(track), 1)
            else track
            for dim, track in enumerate(value)
        )

    def _notice_writes(self, node: fx.Node) -> None:
        """An op without a rule that writes ends the analysis, unless only constants are written."""
        if not writes(node, self.owner):
            return
        views = self._views(node.all_input_nodes)
        given = self._outer is not None and any(view.op == "placeholder" for view in views)
        if given or not self._only_constants(node):
            self.lose(node)
        for view in views:  # tables of positions may be in another order now
            known = shape_of(view) is not None and self._is_constant(view)
            bare = constant_tracks(shape_of(view) or ())
            self._values[view] = bare if known else _new_names(node, view)

    def _fitting(self, node: fx.Node, value: TrackValue) -> TrackValue:
        """Drop tracks that do not add up to the node's shape, whatever rule they came from."""
        if not isinstance(value, tuple):
            return value
        shape = shape_of(node) or ()
        if len(value) != len(shape):
            return None
        return tuple(
            track if same(track_size(track), size) else stream(size, (node, i))
            for i, (track, size) in enumerate(zip(value, shape, strict=True))
        )

    def _placeholder(self, node: fx.Node) -> TrackValue:
        if self._outer is not None and self._arguments:
            argument = self._arguments.pop(0)
            if self._outer.is_from_video(argument):
                self._from_video.add(node)
            self._picks[node] = self._outer.picks_of(argument)
            return self._outer.of(argument) if isinstance(argument, fx.Node) else None
        shape = shape_of(node)
        if shape is None:
            return None
        if _is_state(node):
            return constant_tracks(shape)
        tracks = self.fresh(node)
        if len(shape) in _LATENT_RANKS and example_value(node).is_floating_point():
            axes = latent_axes(node, shape)
            return (tracks[0], *(axis_track(axes, dim) for dim in range(1, len(shape))))
        return tracks

    def _only_constants(self, node: fx.Node) -> bool:
        return all(self._is_constant(argument) for argument in node.all_input_nodes)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether nothing in a node's value is evidence; sizes and modules never are."""
        value = self._values.get(node)
        if isinstance(value, list):
            return all(v is not None and all(map(is_constant, v)) for v in value)
        if self.is_tuple(node):
            return False
        return shape_of(node) is None or all(map(is_constant, self.of(node)))

    def _enter(self, node: fx.Node) -> Iterator[Visit]:
        submodule = submodule_of(node.args[0], self.owner) if node.args else None  # type: ignore[arg-type]
        if submodule is None:
            self.lose(node)
            return
        inner = Provenance(submodule, self, node.args[1:])
        yield from inner.run()
        self.lost_at = inner.lost_at
        self.num_video_sources = inner.num_video_sources
        self._values[node] = inner.outputs

    def _outputs(self, result: Any) -> TrackValue:
        if isinstance(result, tuple | list):
            return [self._outputs(item) for item in result]
        return self._values.get(result) if isinstance(result, fx.Node) else None


def _new_names(node: fx.Node, other: fx.Node) -> TrackValue:
    shape = shape_of(other)
    if shape is None:
        return None
    return tuple(stream(size, (node, other, i)) for i, size in enumerate(shape))


def _is_same_view(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes are surely one tensor: of the same layout in the same memory."""
    a, b = example_value(left), example_value(right)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dim() != b.dim():
        return False
    if not storage_of(left) & storage_of(right):
        return False  # only some runs make them one
    layouts = ((*t.shape, *t.stride(), t.storage_offset()) for t in (a, b))
    return a.dtype == b.dtype and all(map(same, *layouts))


def _is_state(node: fx.Node) -> bool:
    """Whether a placeholder belongs to a module: a parameter, buffer or table, not an input."""
    if MODULE_STATE in node.meta or isinstance(example_value(node), torch.nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None)
    name = "" if source is None else str(getattr(source, "name", ""))
    return _STATE_NAME.search(name) is not None
