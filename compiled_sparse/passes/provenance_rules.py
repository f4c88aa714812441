"""How torch operations move tracks. Importing this module registers the rules.

A rule may drop knowledge; it must never claim a correspondence the operation does not keep.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.op_names import CONSTANTS
from compiled_sparse.passes.op_names import LIKE_FIRST
from compiled_sparse.passes.op_names import POINTWISE
from compiled_sparse.passes.op_names import REDUCTIONS
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import StreamPart
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import common
from compiled_sparse.passes.tracks import constant_tracks
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import merge
from compiled_sparse.passes.tracks import reshape_tracks
from compiled_sparse.passes.tracks import slice_track
from compiled_sparse.passes.tracks import stream
from compiled_sparse.passes.tracks import video


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Read an argument that may be positional or named."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def operand_of(node: fx.Node) -> Any:
    """The tensor an operation works on, by position or under its usual names."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _replaced(tracks: Tracks, index: int, *new: Track) -> Tracks:
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
            merged = merge(result[offset + i], track)
            result[offset + i] = merged or stream(shape[offset + i], (node, offset + i))
    return tuple(result)


@rule("where")
def _where(analysis: Provenance, node: fx.Node) -> TrackValue:
    """Choose between two tensors position by position: they must be the same tokens."""
    shape = shape_of(node)
    if shape is None:
        return None
    condition = _argument(node, 1 if node.op == "call_method" else 0, "condition")
    operands = [n for n in node.all_input_nodes if n is not condition and shape_of(n) is not None]
    choices = [broadcast_tracks(analysis, node, shape, [operand]) for operand in operands]
    result = broadcast_tracks(analysis, node, shape, operands)
    return tuple(
        track if all(c == track or is_constant(c) for c in each) else stream(shape[i], (node, i))
        for i, (track, *each) in enumerate(zip(result, *choices, strict=True))
    )


@rule(*LIKE_FIRST)
def _like_first(analysis: Provenance, node: fx.Node) -> TrackValue:
    operand = operand_of(node)
    return analysis.of(operand) if isinstance(operand, fx.Node) else None


@rule(*CONSTANTS)
def _constant(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    return None if shape is None else constant_tracks(shape)


@rule("conv3d")
def _patch_embedding(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    if shape is None or len(shape) != 5:
        return None
    analysis.start_video(node)
    grid = shape[2:]
    axes = [video(node, (axis,), grid) for axis in range(3)]
    batch = analysis.of(operand_of(node))[0]
    return (batch, stream(shape[1], (node, 1)), *axes)


@rule("linear")
def _linear(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    if shape is None:
        return None
    tracks = analysis.of(operand_of(node))
    return (*tracks[:-1], stream(shape[-1], (node, len(shape) - 1)))


@rule("matmul", "mm", "bmm")
def _matmul(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    weight = _argument(node, 1, "other", node.kwargs.get("mat2"))
    if shape is None or not isinstance(weight, fx.Node) or _rank(weight) != 2:
        return None
    return _linear(analysis, node)


@rule("scaled_dot_product_attention")
def _attention(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    query = _argument(node, 0, "query")
    if shape is None or not isinstance(query, fx.Node):
        return None
    return (*analysis.of(query)[:-1], stream(shape[-1], (node, len(shape) - 1)))


@rule(*REDUCTIONS)
def _reduction(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    before = shape_of(operand) if isinstance(operand, fx.Node) else None
    if shape is None or before is None or len(shape) != len(before):
        return None
    tracks = analysis.of(operand)
    return tuple(
        track if same(size, kept) else stream(1)
        for track, size, kept in zip(tracks, before, shape, strict=True)
    )


@rule("permute", "transpose", "swapaxes", "swapdims", "t")
def _permute(analysis: Provenance, node: fx.Node) -> TrackValue:
    operand = operand_of(node)
    if not isinstance(operand, fx.Node):
        return None
    tracks = analysis.of(operand)
    return tuple(tracks[axis] for axis in permutation_of(node, _rank(operand)))


def permutation_of(node: fx.Node, rank: int) -> list[int]:
    """Return which dimension of the operand each dimension of a permutation's result is."""
    order = list(range(rank))
    name = op_name(node)
    if name == "permute":
        dims = _argument(node, 1, "dims")
        given: Any = dims if isinstance(dims, Sequence) else node.args[1:]
        order = [int(dim) % rank for dim in given]
    elif name == "t":
        order.reverse()
    else:
        first = _argument(node, 1, "dim0", node.kwargs.get("axis0"))
        second = _argument(node, 2, "dim1", node.kwargs.get("axis1"))
        order[first], order[second] = order[second % rank], order[first % rank]
    return order


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshape(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    if shape is None or not isinstance(operand, fx.Node):
        return None
    if op_name(node) == "view" and any(isinstance(a, torch.dtype) for a in node.args):
        return None
    before = shape_of(operand)
    return reshape_tracks(before or (), analysis.of(operand), shape, node)


@rule("view_as_complex")
def _view_as_complex(analysis: Provenance, node: fx.Node) -> TrackValue:
    return analysis.of(operand_of(node))[:-1]


@rule("view_as_real")
def _view_as_real(analysis: Provenance, node: fx.Node) -> TrackValue:
    return (*analysis.of(operand_of(node)), stream(2))


@rule("expand", "expand_as", "broadcast_to", "repeat")
def _expand(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    if shape is None or not isinstance(operand, fx.Node):
        return None
    before = shape_of(operand) or ()
    tracks, offset = analysis.of(operand), len(shape) - len(before)
    return tuple(
        tracks[i - offset]
        if i >= offset and same(before[i - offset], size)
        else stream(size, (node, i))
        for i, size in enumerate(shape)
    )


@rule("cat", "concat", "concatenate")
def _concatenate(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    operands = _argument(node, 0, "tensors")
    if shape is None or not _are_of_rank(operands, len(shape)):
        return None
    dim = _argument(node, 1, "dim", node.kwargs.get("axis", 0)) % len(shape)
    result: Tracks | None = None
    joined: list[Part] = []
    for operand in operands:
        tracks = analysis.of(operand)
        joined.extend(part for part in tracks[dim] if not same(part.size, 0))
        others = _replaced(tracks, dim, stream(shape[dim]))
        result = others if result is None else _side_by_side(node, shape, result, others)
    return None if result is None else _replaced(result, dim, _named_constants(node, joined))


def _named_constants(node: fx.Node, parts: list[Part]) -> Track:
    """Learned tokens beside others are tokens too: from here on they have an identity."""
    if is_constant(tuple(parts)):
        return tuple(parts)
    return tuple(
        StreamPart(frozenset({(node, i)}), part.size) if is_constant((part,)) else part
        for i, part in enumerate(parts)
    )


def _are_of_rank(operands: Any, rank: int) -> bool:
    """Whether operands are tensors of one rank; `cat` also takes empty ones of rank 1."""
    is_list = isinstance(operands, tuple | list)
    return is_list and all(isinstance(n, fx.Node) and _rank(n) == rank for n in operands)


def _side_by_side(node: fx.Node, shape: Sequence[Any], left: Tracks, right: Tracks) -> Tracks:
    """Combine the tracks of joined tensors: what one holds says nothing of the other."""
    joined = [common(a, b) for a, b in zip(left, right, strict=True)]
    return tuple(track or stream(shape[i], (node, i)) for i, track in enumerate(joined))


@rule("stack")
def _stack(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    operands = _argument(node, 0, "tensors")
    if shape is None or not _are_of_rank(operands, len(shape) - 1):
        return None
    dim = _argument(node, 1, "dim", 0) % len(shape)
    result: Tracks | None = None
    for operand in operands:
        tracks = analysis.of(operand)
        tracks = (*tracks[:dim], stream(shape[dim], (node, dim)), *tracks[dim:])
        result = tracks if result is None else _side_by_side(node, shape, result, tracks)
    return result


@rule("chunk", "split", "tensor_split", "split_with_sizes", "unbind")
def _split(analysis: Provenance, node: fx.Node) -> TrackValue:
    outputs, operand = example_value(node), operand_of(node)
    if not isinstance(operand, fx.Node) or not isinstance(outputs, tuple | list):
        return None
    unbind = op_name(node) == "unbind"
    dim = _argument(node, 1 if unbind else 2, "dim", 0) % _rank(operand)
    tracks = analysis.of(operand)
    start: Any = 0
    result = []
    for i, output in enumerate(outputs):
        if unbind:
            result.append(_replaced(tracks, dim))
            continue
        size = output.shape[dim]
        whole = slice_track(tracks[dim], start, start + size)
        piece = whole or _piece(tracks[dim], size, (node, i))
        result.append(_replaced(tracks, dim, piece))
        start = start + size
    return result


def _piece(track: Track, size: Any, origin: Any) -> Track:
    return stream(size) if is_constant(track) else stream(size, origin)


@rule("getitem", "__getitem__")
def _getitem(analysis: Provenance, node: fx.Node) -> TrackValue:
    source: Any = node.args[0]
    index: Any = node.args[1]
    if not isinstance(source, fx.Node):
        return None
    if analysis.is_tuple(source):
        return analysis.outputs_of(source, index) if isinstance(index, int) else None
    items = index_items(index, _rank(source))
    return None if items is None else _index_tracks(analysis, node, source, items)


def index_items(index: Any, rank: int) -> list[Any] | None:
    """Expand an index to one item per dimension (plus None for new ones); None if it gathers."""
    items = list(index) if isinstance(index, tuple) else [index]
    plain = (item is None or item is Ellipsis or isinstance(item, int | slice) for item in items)
    if not all(plain) or any(isinstance(item, bool) for item in items):
        return None
    used = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (rank - used)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        return items[:at] + missing + items[at + 1 :]
    return items + missing


def _index_tracks(analysis: Provenance, node: fx.Node, source: fx.Node, items: list[Any]) -> Tracks:
    tracks, shape = analysis.of(source), shape_of(source) or ()
    new_shape = shape_of(node) or ()
    result: list[Track] = []
    dim = 0
    for item in items:
        if item is None:
            result.append(stream(1))
            continue
        if isinstance(item, slice):
            size = new_shape[len(result)]
            kept = slice_dim(tracks[dim], shape[dim], item)
            result.append(kept or _piece(tracks[dim], size, (node, len(result))))
        dim += 1
    return tuple(result)


def slice_dim(track: Track, size: Any, item: slice) -> Track | None:
    """Return the track of a slice of one dimension, or None if it cannot be followed."""
    if item.step not in (None, 1):
        return None
    start = _position(item.start, size, 0)
    stop = _position(item.stop, size, size)
    return None if start is None or stop is None else slice_track(track, start, stop)


def _position(value: Any, size: Any, default: Any) -> Any:
    """Resolve a slice bound; bounds that are graph nodes are read from their example value."""
    if isinstance(value, fx.Node):
        value = example_value(value)
        if value is None:
            return None
    if value is None or (isinstance(value, int) and value == sys.maxsize):
        return default
    if isinstance(value, int):
        return value + size if value < 0 else value
    negative = value.node.expr.could_extract_minus_sign()
    return value + size if negative else value
