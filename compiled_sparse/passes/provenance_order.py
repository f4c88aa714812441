"""Operations that put positions in another order. Importing this module registers the rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.provenance_rules import argument
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.rearranged import flipped
from compiled_sparse.passes.rearranged import rearranged
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import stream


@rule("flip")
def _flip(analysis: Provenance, node: fx.Node) -> TrackValue:
    given: Any = argument(node, 1, "dims")
    dims: Sequence[Any] = given if isinstance(given, Sequence) else node.args[1:]
    shape, operand = shape_of(node), operand_of(node)
    if shape is None or not isinstance(operand, fx.Node):
        return None
    turned = {int(dim) % len(shape) for dim in dims}
    return tuple(
        flipped(track, shape[dim]) if dim in turned else track
        for dim, track in enumerate(analysis.of(operand))
    )


@rule("roll")
def _roll(analysis: Provenance, node: fx.Node) -> TrackValue:
    given: Any = argument(node, 2, "dims")
    if given is None or given == ():
        return moved_dims(analysis, node, None)
    return moved_dims(analysis, node, list(given) if isinstance(given, Sequence) else [given])


@rule("index_select", "gather", "take_along_dim")
def _select(analysis: Provenance, node: fx.Node) -> TrackValue:
    position = 2 if _takes_index_first(node) else 1
    dim = argument(node, position, "dim")
    return moved_dims(analysis, node, [dim] if isinstance(dim, int) else None)


def _takes_index_first(node: fx.Node) -> bool:
    """`take_along_dim(input, indices, dim)`, unlike the others."""
    return len(node.args) > 1 and isinstance(node.args[1], fx.Node)


def moved_dims(analysis: Provenance, node: fx.Node, dims: list[Any] | None) -> TrackValue:
    """Return the tracks of an operand of which some dimensions are in another order.

    Args:
        analysis: Of the node's graph.
        node: The operation; its first operand is what it moves.
        dims: The dimensions; None for all.
    """
    shape, operand = shape_of(node), operand_of(node)
    before = shape_of(operand) if isinstance(operand, fx.Node) else None
    if shape is None or before is None:
        return None
    tracks = analysis.of(operand)
    if len(before) != len(shape) or (
        dims is not None and not all(isinstance(d, int) for d in dims)
    ):
        return scattered(node, shape, tracks)
    moved = set(range(len(shape))) if dims is None else {dim % len(shape) for dim in dims}
    return tuple(
        rearranged(node, dim, size, track)
        if dim in moved
        else track
        if same(size, before[dim])
        else stream(size, (node, dim))
        for dim, (size, track) in enumerate(zip(shape, tracks, strict=True))
    )


def scattered(node: fx.Node, shape: Sequence[Any], tracks: Tracks) -> Tracks:
    """Return tracks of which any dimension may be made of any dimension of an operand."""
    everything: Track = tuple(part for track in tracks for part in track)
    return tuple(rearranged(node, dim, size, everything) for dim, size in enumerate(shape))
