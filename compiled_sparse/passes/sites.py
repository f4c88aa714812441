"""Every attention call of a graph, with what is known about its tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes import mask_rules as _mask_rules  # noqa: F401 - registers the rules
from compiled_sparse.passes import mask_structure as _mask_structure  # noqa: F401 - likewise
from compiled_sparse.passes import provenance_exchanges as _exchanges  # noqa: F401 - rules
from compiled_sparse.passes import provenance_positions as _positions  # noqa: F401 - rules
from compiled_sparse.passes import provenance_rules as _rules  # noqa: F401 - registers the rules
from compiled_sparse.passes import provenance_shapes as _shapes  # noqa: F401 - registers the rules
from compiled_sparse.passes import provenance_sources as _sources  # noqa: F401 - rules
from compiled_sparse.passes import provenance_writes as _writes  # noqa: F401 - registers the rules
from compiled_sparse.passes.combining import shares_provenance
from compiled_sparse.passes.exchanges import Exchange
from compiled_sparse.passes.exchanges import exchange_before
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import module_path
from compiled_sparse.passes.fx import nested_graphs
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.mask_analysis import masks_at
from compiled_sparse.passes.mask_values import MaskValue
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import Visit
from compiled_sparse.passes.rings import Ring
from compiled_sparse.passes.rings import ring_of
from compiled_sparse.passes.sdpa import arguments_of
from compiled_sparse.passes.sdpa import is_sdpa
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import track_size

_KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
OTHER_ATTENTION = frozenset(
    {"flex_attention", "multi_head_attention_forward"}
    | {f"_scaled_dot_product_{kernel}" for kernel in _KERNELS}
)


@dataclass(frozen=True)
class Site:
    """One call of `scaled_dot_product_attention`.

    Args:
        node: The call.
        owner: Graph module whose graph holds it.
        root: Graph module where the analysis began; what tracks name is comparable under one root.
        path: Dotted path of the module that made the call.
        arguments: All arguments by name, as nodes or values.
        query_track: What the query positions are.
        key_track: What the key positions are.
        value_track: What the value positions are.
        batch_track: What the queries' first dimension is.
        analysis: Of the graph that holds the call.
        has_one_batch: Whether queries, keys and values are provably of the same batch members.
        graph_has_video: Whether there is a patch embedding in the graph.
        query_from_video: Whether the queries are computed from a patch embedding.
        key_from_video: Whether the keys are.
        lost_at: The write that ended the analysis before this call, if one did.
        mask: What the attention mask holds, where that is known.
        exchange: What brought together its tokens, where they are divided among processes.
    """

    node: fx.Node
    owner: fx.GraphModule
    root: fx.GraphModule
    path: str
    arguments: dict[str, Any]
    query_track: Track
    key_track: Track
    value_track: Track
    batch_track: Track
    analysis: Provenance
    has_one_batch: bool
    graph_has_video: bool
    query_from_video: bool
    key_from_video: bool
    lost_at: fx.Node | None
    mask: MaskValue | None = None
    exchange: Exchange | None = None

    @property
    def local(self) -> Site:
        """The call as it would be of this rank's tokens and all heads, to find its gate."""
        if self.exchange is None:
            return self
        nodes = self.exchange.local
        query, key, value = (self.analysis.of(nodes[name])[-2] for name in nodes)
        return dataclasses.replace(
            self,
            arguments={**self.arguments, **nodes},
            query_track=query,
            key_track=key,
            value_track=value,
            exchange=None,
        )

    @property
    def ring(self) -> Ring | None:
        """The ring that its keys go round, if they do."""
        return ring_of(self.node)

    @property
    def num_heads(self) -> int:
        """Query heads, those of other processes included."""
        if self.exchange is not None:
            return self.exchange.num_heads
        return hint(self.tensor("query").shape[1])

    @property
    def num_key_heads(self) -> int:
        """Key heads, likewise."""
        if self.exchange is not None:
            return self.exchange.num_key_heads
        return hint(self.tensor("key").shape[1])

    def tensor(self, name: str) -> torch.Tensor:
        """Return the fake tensor of argument `query`, `key`, `value` or `attn_mask`."""
        value = example_value(self.arguments[name])
        assert isinstance(value, torch.Tensor)
        return value

    @property
    def is_self_length(self) -> bool:
        """Whether queries and keys are provably equally many."""
        return same(self.tensor("query").shape[-2], self.tensor("key").shape[-2])


@dataclass(frozen=True)
class OtherAttention:
    """An attention call this package does not rewrite, such as `flex_attention`.

    Args:
        path: Dotted path of the module that made the call.
        name: What it calls.
        self_length: Number of queries where there are provably as many keys, else None.
    """

    path: str
    name: str
    self_length: int | None = None


def find_sites(owner: fx.GraphModule) -> tuple[list[Site], list[OtherAttention]]:
    """Find all attention calls, nested graphs included, in execution order.

    Args:
        owner: Graph module as Dynamo hands it out, or its clone.

    Returns:
        The calls of `scaled_dot_product_attention`, and the other attention calls.
    """
    sites: list[Site] = []
    others: list[OtherAttention] = []
    entered = {id(owner)}
    analysis = Provenance(owner)
    for visit in analysis.run():
        entered.add(id(visit.owner))
        _collect(visit, owner, sites, others)
    # A text refiner may run before the patch embedding does.
    has_video = analysis.num_video_sources > 0
    sites = [dataclasses.replace(site, graph_has_video=has_video) for site in sites]
    masks = masks_at(owner, _mask_of)
    for graph in _unentered(owner, entered):
        for visit in Provenance(graph).run():
            _collect(visit, graph, sites, others)
        masks.update(masks_at(graph, _mask_of))
    return [dataclasses.replace(site, mask=masks.get(site.node)) for site in sites], others


def _collect(
    visit: Visit, root: fx.GraphModule, sites: list[Site], others: list[OtherAttention]
) -> None:
    if visit.node.op != "call_function":
        return
    if is_sdpa(visit.node):
        sites.append(_site(visit, root))
    elif op_name(visit.node) in OTHER_ATTENTION:
        others.append(_other(visit.node))


def _other(node: fx.Node) -> OtherAttention:
    name = op_name(node)
    query, key, *_ = (*node.args, *node.kwargs.values())
    shapes = [shape_of(each) or () if isinstance(each, fx.Node) else () for each in (query, key)]
    dim = 0 if name == "multi_head_attention_forward" else -2  # that has the sequence first
    lengths = [shape[dim] for shape in shapes if len(shape) > 1]
    is_self_length = len(lengths) == 2 and same(*lengths)
    return OtherAttention(module_path(node), name, hint(lengths[0]) if is_self_length else None)


def _unentered(owner: fx.GraphModule, entered: set[int]) -> list[fx.GraphModule]:
    """Nested graphs the walk did not enter (branches, loops): their inputs are unknown."""
    found = []
    for _, submodule in nested_graphs(owner):
        if id(submodule) not in entered:
            entered.add(id(submodule))
            found.append(submodule)
        found += _unentered(submodule, entered)
    return found


def _mask_of(node: fx.Node) -> Any:
    return arguments_of(node)["attn_mask"] if is_sdpa(node) else None


def _site(visit: Visit, root: fx.GraphModule) -> Site:
    node, analysis = visit.node, visit.analysis
    arguments = arguments_of(node)
    nodes = tuple(arguments[name] for name in ("query", "key", "value"))
    query, key, value = map(analysis.of, nodes)
    return Site(
        node=node,
        owner=visit.owner,
        root=root,
        path=module_path(node),
        arguments=arguments,
        query_track=query[-2],
        key_track=key[-2],
        value_track=value[-2],
        batch_track=query[0],
        analysis=analysis,
        has_one_batch=has_one_batch(analysis, *nodes),
        graph_has_video=analysis.num_video_sources > 0,
        query_from_video=analysis.is_from_video(arguments["query"]),
        key_from_video=analysis.is_from_video(arguments["key"]),
        lost_at=analysis.lost_at,
        exchange=exchange_before(nodes[0]),
    )


def has_one_batch(analysis: Provenance, *nodes: fx.Node) -> bool:
    """Whether queries, keys and values are provably of the same members of the batch.

    Args:
        analysis: Of the graph that holds them.
        *nodes: The three.
    """
    query, key, value = (analysis.of(node)[0] for node in nodes)
    of_query, of_key, of_value = map(analysis.picks_of, nodes)
    if of_query != of_key or not of_value <= of_query:
        return False
    sizes = [track_size(track) for track in (query, key, value)]
    if any(same(size, 1) for size in sizes):  # one member, or refused as a broadcast
        return True
    return query == key == value or shares_provenance(query, key, value)
