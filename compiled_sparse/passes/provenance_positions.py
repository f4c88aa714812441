"""Tables of positions built in the graph. Importing this module registers the rules.

A rotation by such a table says of packed tokens which place on which grid each of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.tracks import Axes
from compiled_sparse.passes.tracks import Kind
from compiled_sparse.passes.tracks import Reader
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import axis_track
from compiled_sparse.passes.tracks import is_bare
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import sole_piece
from compiled_sparse.passes.tracks import stream


@rule("arange", "linspace")
def _count(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    return None if shape is None else (_counted(node, 0, shape[0]),)


def _counted(node: fx.Node, dim: int, size: Any) -> Track:
    return axis_track(Axes(node, Kind.POSITIONS, (size,), (Reader(node, dim),)), 0)


@rule("meshgrid")
def _meshgrid(analysis: Provenance, node: fx.Node) -> TrackValue:
    """Every output has all axes as its dimensions, in the order of the operands."""
    outputs = example_value(node)
    operands = node.args[0] if isinstance(node.args[0], Sequence) else node.args
    if not isinstance(outputs, tuple | list) or node.kwargs.get("indexing", "ij") not in _ORDERS:
        return None
    if not all(_is_count(analysis, operand) for operand in operands):
        return None
    order = list(operands)
    if node.kwargs.get("indexing") == "xy" and len(order) > 1:
        order[:2] = reversed(order[:2])
    readers = tuple(Reader(operand, 0) for operand in order if isinstance(operand, fx.Node))
    axes = Axes(node, Kind.POSITIONS, tuple(outputs[0].shape), readers)
    tracks = tuple(axis_track(axes, axis) for axis in range(len(readers)))
    return [tracks for _ in outputs]


_ORDERS = ("ij", "xy", None)


def _is_count(analysis: Provenance, operand: Any) -> bool:
    """Whether a tensor counts from one position to the next."""
    shape = shape_of(operand) if isinstance(operand, fx.Node) else None
    if shape is None or len(shape) != 1:
        return False
    (track,) = analysis.of(operand)
    piece = sole_piece(track)
    counts = piece is not None and piece.kind is Kind.POSITIONS and len(piece.axes.sizes) == 1
    return same(shape[0], 1) or (counts and piece is not None and piece.is_whole)


@rule("expand", "expand_as", "broadcast_to", "repeat")
def _expand(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    if shape is None or not isinstance(operand, fx.Node):
        return None
    before = shape_of(operand) or ()
    before = (1,) * (len(shape) - len(before)) + before
    tracks = analysis.of(operand)
    constant = all(map(is_constant, tracks))
    tracks = (stream(1),) * (len(shape) - len(tracks)) + tracks
    result = [
        track if same(old, new) else stream(new, *(() if constant else ((node, dim),)))
        for dim, (track, old, new) in enumerate(zip(tracks, before, shape, strict=True))
    ]
    own = _own_dim(before, shape)
    if constant and own is not None and is_bare(result[own]):
        result[own] = _counted(node, own, shape[own])
    return tuple(result)


def _own_dim(before: Sequence[Any], shape: Sequence[Any]) -> int | None:
    """The one dimension along which a table of features differs, spread over all others."""
    long = [dim for dim, size in enumerate(shape[:-1]) if not same(size, 1)]
    own = [dim for dim in long if same(before[dim], shape[dim])]
    return own[0] if len(own) == 1 and len(long) > 1 else None
