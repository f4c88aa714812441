"""The learned gate of an attention module, put in front of the call it weighs.

The marker of an attached module carries what its gate makes of one of the module's arguments. That
counts only for the hidden state that provably feeds queries, keys and values; where this is another
tensor, such as text and video in one sequence, the gate's operations are repeated on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiled_sparse.passes.combining import shares_provenance
from compiled_sparse.passes.fx import between
from compiled_sparse.passes.fx import call
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.hidden import HiddenState
from compiled_sparse.passes.hidden import hidden_states
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.markers import Gate
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import track_size
from compiled_sparse.passes.writes import writes
from compiled_sparse.registry import Refused

_TOKEN_WISE = frozenset(
    {"linear", "matmul", "add", "mul", "dropout", "clone", "to", "type_as", "float"}
)
"""Operations that may be repeated on another number of tokens."""


def find_hidden_state(site: Site, layout: SiteLayout, gate: Gate) -> HiddenState | Refused:
    """Return what the gate of a call is to be computed from, or why nobody can tell.

    Args:
        site: The call.
        layout: Where its video is.
        gate: What the module's marker carries.
    """
    if gate.value is None or gate.source is None or gate.value.graph is not site.node.graph:
        return _unplaced(gate, "no argument of the module fits it")
    query = site.tensor("query")
    if not same((shape_of(gate.value) or (0,))[-1], query.shape[1] * query.shape[3]):
        heads = f"{hint(query.shape[1])} heads of {hint(query.shape[3])}"
        return _unplaced(gate, f"its width is not that of {heads}")
    found = [
        each
        for each in hidden_states(site, gate.given)
        if each.is_of_batch and _can_repeat(gate, each.node) and _fits(site, layout, each)
    ]
    if len(found) != 1:
        return _unplaced(gate, f"{len(found)} hidden states provably feed queries, keys and values")
    if _is_written(found[0].node, site.analysis.writers):
        return _unplaced(gate, f"{found[0].node.name!r} is written in place")
    return found[0]


def _unplaced(gate: Gate, why: str) -> Refused:
    return Refused("gate_unplaced", f"gate {gate.name!r}: {why}")


def _can_repeat(gate: Gate, node: fx.Node) -> bool:
    """Whether a gate's operations mean the same on another tensor [batch, tokens, channels]."""
    assert gate.source is not None
    assert gate.value is not None
    given, other = example_value(gate.source), example_value(node)
    fits = given.dtype == other.dtype and given.device == other.device
    fits = fits and all(same(given.shape[dim], other.shape[dim]) for dim in (0, 2))
    if same(given.shape[1], other.shape[1]):
        return fits
    return fits and all(op_name(each) in _TOKEN_WISE for each in between(gate.source, gate.value))


def _fits(site: Site, layout: SiteLayout, hidden: HiddenState) -> bool:
    """Whether its tokens are the sequence's, or the video's, in the same order."""
    tokens: Track | None = site.query_track
    if not same(track_size(hidden.tokens), track_size(site.query_track)):
        tokens = _video(site.query_track, layout)
    return tokens is not None and shares_provenance(tokens, tokens, hidden.tokens)


def _video(track: Track, layout: SiteLayout) -> Track | None:
    """Return the parts of a sequence that are its video."""
    for first in range(len(track)):
        for last in range(first + 1, len(track) + 1):
            is_behind = same(track_size(track[:first]), layout.text_before)
            if is_behind and same(track_size(track[last:]), layout.text_after):
                return track[first:last]
    return None


def _is_written(node: fx.Node, writers: Sequence[fx.Node]) -> bool:
    memory = storage_of(node)
    inputs = (given for each in writers for given in each.all_input_nodes)
    return any(memory & storage_of(given) for given in inputs)


def insert_gate(site: Site, hidden: HiddenState, gate: Gate, text: tuple[Any, Any]) -> fx.Node:
    """Put the gate's values in front of a call, shaped like its queries.

    Args:
        site: The call; the graph's insertion point must be before it.
        hidden: What `find_hidden_state` returned.
        gate: What the module's marker carries.
        text: Text tokens before and after the video, as graph arguments.

    Returns:
        [batch, query heads, length, head_dim]; zero at text that has no hidden state here.
    """
    assert gate.source is not None
    assert gate.value is not None
    value = gate.value
    if hidden.node is not gate.source:
        value = _repeated(site, gate.source, gate.value, hidden.node)
    query = site.tensor("query")
    if example_value(value).dtype != query.dtype:
        value = call(torch.ops.aten.to.dtype, value, query.dtype)
    value = call(torch.unflatten, value, -1, (hint(query.shape[1]), hint(query.shape[3])))
    value = call(torch.transpose, value, 1, 2)
    is_whole = same(track_size(hidden.tokens), query.shape[2])
    return value if is_whole else call(F.pad, value, (0, 0, *text))


def _repeated(site: Site, source: fx.Node, value: fx.Node, other: fx.Node) -> fx.Node:
    """Copy what leads from one node to another, starting from a third."""
    copies = {source: other}
    for node in sorted(between(source, value)):  # in the graph's order
        copy = source.graph.node_copy(node, lambda each: copies.get(each, each))
        copy.meta["example_value"] = compute(copy)
        copies[node] = copy
        if writes(copy, site.owner):
            site.analysis.writers.append(copy)
    return copies[value]
