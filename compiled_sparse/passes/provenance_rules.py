"""How torch operations move tracks. Importing this module registers the rules.

A rule may drop knowledge; it must never claim a correspondence the operation does not keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from compiled_sparse.passes.combining import merge
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.op_names import CONSTANTS
from compiled_sparse.passes.op_names import LIKE_FIRST
from compiled_sparse.passes.op_names import POINTWISE
from compiled_sparse.passes.op_names import PRODUCTS
from compiled_sparse.passes.op_names import REDUCTIONS
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.rearranged import contradiction
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import constant_tracks
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import stream


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Read an argument that may be positional or named."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def operand_of(node: fx.Node) -> Any:
    """The tensor an operation works on, by position or under its usual names."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def rank_of(node: fx.Node) -> int:
    """Number of dimensions of a node's tensor."""
    return len(shape_of(node) or ())


def replaced(tracks: Tracks, index: int, *new: Track) -> Tracks:
    """Tracks with those of one dimension exchanged."""
    return (*tracks[:index], *new, *tracks[index + 1 :])


@rule(*POINTWISE)
def pointwise(analysis: Provenance, node: fx.Node) -> TrackValue:
    """Combine the tracks of all tensor operands of a node, aligned from the last dimension."""
    shape = shape_of(node)
    if shape is None:
        return None
    operands = [n for n in node.all_input_nodes if shape_of(n) is not None]
    return broadcast_tracks(analysis, node, shape, operands)


def broadcast_tracks(
    analysis: Provenance, node: fx.Node, shape: Sequence[Any], operands: Sequence[fx.Node]
) -> Tracks:
    """Combine the tracks of `operands` broadcast to `shape`; contradictions become unknown."""
    result = list(constant_tracks(shape))
    for operand in operands:
        operand_shape = shape_of(operand) or ()
        offset = len(shape) - len(operand_shape)
        for i, track in enumerate(analysis.of(operand)):
            # A size of one says nothing about the positions it is spread over.
            if same(operand_shape[i], 1) and not same(shape[offset + i], 1):
                continue
            before, dim = result[offset + i], offset + i
            merged = merge(before, track, positions=op_name(node) in PRODUCTS)
            result[dim] = merged or contradiction(node, dim, shape[dim], before, track)
    return tuple(result)


@rule("where")
def _where(analysis: Provenance, node: fx.Node) -> TrackValue:
    """Choose between two tensors position by position: they must be the same tokens or places."""
    shape = shape_of(node)
    if shape is None:
        return None
    condition = argument(node, 1 if node.op == "call_method" else 0, "condition")
    operands = [n for n in node.all_input_nodes if n is not condition and shape_of(n) is not None]
    choices = [broadcast_tracks(analysis, node, shape, [operand]) for operand in operands]
    result = broadcast_tracks(analysis, node, shape, operands)
    chosen: list[Track] = []
    for i, (track, *each) in enumerate(zip(result, *choices, strict=True)):
        constant = is_constant(track)
        kept = all(choice == track or (is_constant(choice) and not constant) for choice in each)
        chosen.append(track if kept else stream(shape[i], *(() if constant else ((node, i),))))
    return tuple(chosen)


@rule(*LIKE_FIRST)
def _like_first(analysis: Provenance, node: fx.Node) -> TrackValue:
    operand = operand_of(node)
    return analysis.of(operand) if isinstance(operand, fx.Node) else None


@rule("scaled_dot_product_attention")
def _attention(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    query = argument(node, 0, "query")
    if shape is None or not isinstance(query, fx.Node):
        return None
    return (*analysis.of(query)[:-1], stream(shape[-1], (node, len(shape) - 1)))


@rule(*REDUCTIONS)
def _reduction(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    before = shape_of(operand) if isinstance(operand, fx.Node) else None
    if shape is None or before is None:
        return None
    tracks = analysis.of(operand)
    if len(shape) != len(before):
        gone = _reduced_dims(node, len(before))
        kept = [track for dim, track in enumerate(tracks) if dim not in gone]
        return tuple(kept) if len(kept) == len(shape) else None
    return tuple(
        track if same(size, kept) else stream(1)
        for track, size, kept in zip(tracks, before, shape, strict=True)
    )


def _reduced_dims(node: fx.Node, rank: int) -> set[int]:
    """Dimensions a reduction names; without names, none, which fits no shape."""
    dims = argument(node, 2 if op_name(node) == "norm" else 1, "dim", node.kwargs.get("axis"))
    given = dims if isinstance(dims, Sequence) else [dims]
    return {dim % rank for dim in given if isinstance(dim, int) and not isinstance(dim, bool)}


@rule(*CONSTANTS)
def _constant(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    return None if shape is None else constant_tracks(shape)
