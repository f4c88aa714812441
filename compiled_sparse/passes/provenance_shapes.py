"""How operations that move dimensions move tracks. Importing this module registers the rules.

A rule may drop knowledge; it must never claim a correspondence the operation does not keep.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.combining import common
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.provenance_order import moved_dims
from compiled_sparse.passes.provenance_order import scattered
from compiled_sparse.passes.provenance_rules import argument
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.provenance_rules import rank_of
from compiled_sparse.passes.provenance_rules import replaced
from compiled_sparse.passes.reshapes import joined
from compiled_sparse.passes.reshapes import reshape_tracks
from compiled_sparse.passes.reshapes import slice_track
from compiled_sparse.passes.tracks import Kind
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import axis_track
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import latent_axes
from compiled_sparse.passes.tracks import readable
from compiled_sparse.passes.tracks import sole_piece
from compiled_sparse.passes.tracks import stream


def unnamed(node: fx.Node, dim: int, shape: Sequence[Any], *before: Track) -> Track:
    """Track of a dimension whose positions are no longer those of what it was made of.

    A dimension made of that dimension of an input is as good as an input's: it may turn out to be
    an axis to be patched. Anything else is unknown from here on.
    """
    if all(map(is_constant, before)):
        return stream(shape[dim])
    pieces = [sole_piece(track) for track in before]
    known = [piece for piece in pieces if piece is not None and piece.kind is Kind.LATENT]
    if any(p.is_whole and p.axis == dim and len(p.axes.sizes) == len(shape) for p in known):
        return axis_track(latent_axes(node, shape), dim)
    return stream(shape[dim], (node, dim))


@rule("permute", "transpose", "swapaxes", "swapdims", "t")
def _permute(analysis: Provenance, node: fx.Node) -> TrackValue:
    operand = operand_of(node)
    if not isinstance(operand, fx.Node):
        return None
    tracks = analysis.of(operand)
    return tuple(tracks[axis] for axis in permutation_of(node, rank_of(operand)))


def permutation_of(node: fx.Node, rank: int) -> list[int]:
    """Return which dimension of the operand each dimension of a permutation's result is."""
    order = list(range(rank))
    name = op_name(node)
    if name == "permute":
        dims = argument(node, 1, "dims")
        given: Any = dims if isinstance(dims, Sequence) else node.args[1:]
        order = [int(dim) % rank for dim in given]
    elif name == "t":
        order.reverse()
    else:
        first = argument(node, 1, "dim0", node.kwargs.get("axis0"))
        second = argument(node, 2, "dim1", node.kwargs.get("axis1"))
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
    return readable(node, reshape_tracks(before or (), analysis.of(operand), shape, node))


@rule("unfold")
def _unfold(analysis: Provenance, node: fx.Node) -> TrackValue:
    """Cut a dimension into windows; those that neither overlap nor leave anything are digits."""
    shape, operand = shape_of(node), operand_of(node)
    before = shape_of(operand) if isinstance(operand, fx.Node) else None
    if node.op != "call_method" or shape is None or not before or len(shape) != len(before) + 1:
        return None
    dim = argument(node, 1, "dimension", 0) % len(before)
    size, step = argument(node, 2, "size"), argument(node, 3, "step")
    tracks = analysis.of(operand)
    if not same(size, step) or not same(shape[dim] * size, before[dim]):
        return (*replaced(tracks, dim, stream(shape[dim], (node, dim))), stream(size, (node, -1)))
    digits = reshape_tracks((before[dim],), (tracks[dim],), (shape[dim], size), node)
    return readable(node, (*replaced(tracks, dim, digits[0]), digits[1]))


@rule("repeat_interleave")
def _repeat_interleave(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    dim = argument(node, 2, "dim")
    if shape is None or dim is None or not isinstance(operand, fx.Node):
        return None
    dim, tracks = dim % len(shape), analysis.of(operand)
    return replaced(tracks, dim, unnamed(node, dim, shape, tracks[dim]))


@rule("outer")
def _outer(analysis: Provenance, node: fx.Node) -> TrackValue:
    left, right = operand_of(node), argument(node, 1, "vec2", node.kwargs.get("other"))
    return (*analysis.of(left), *analysis.of(right))


@rule("pad")
def _pad(analysis: Provenance, node: fx.Node) -> TrackValue:
    """What is padded has other positions; a dimension that is not stays what it is."""
    shape, operand, amounts = shape_of(node), operand_of(node), argument(node, 1, "pad")
    if shape is None or not isinstance(operand, fx.Node) or not isinstance(amounts, Sequence):
        return None
    tracks = list(analysis.of(operand))
    for i in range(len(amounts) // 2):
        dim = len(shape) - 1 - i
        if not all(same(amount, 0) for amount in amounts[2 * i : 2 * i + 2]):
            tracks[dim] = unnamed(node, dim, shape, tracks[dim])
    return tuple(tracks)


@rule("view_as_complex")
def _view_as_complex(analysis: Provenance, node: fx.Node) -> TrackValue:
    return analysis.of(operand_of(node))[:-1]


@rule("view_as_real")
def _view_as_real(analysis: Provenance, node: fx.Node) -> TrackValue:
    return (*analysis.of(operand_of(node)), stream(2))


@rule("cat", "concat", "concatenate")
def _concatenate(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    operands = argument(node, 0, "tensors")
    if shape is None or not _are_of_rank(operands, len(shape)):
        return None
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0)) % len(shape)
    result: Tracks | None = None
    parts: list[Part] = []
    for operand in operands:
        tracks = analysis.of(operand)
        parts.extend(part for part in tracks[dim] if not same(part.size, 0))
        others = replaced(tracks, dim, stream(shape[dim]))
        result = others if result is None else _side_by_side(node, shape, result, others)
    return None if result is None else replaced(result, dim, _named_constants(node, parts))


def _named_constants(node: fx.Node, parts: list[Part]) -> Track:
    """Learned tokens beside others are tokens too: from here on they have an identity."""
    if is_constant(tuple(parts)):
        return joined(parts)
    return joined(
        [
            Part((Stream(frozenset({(node, i)}), part.size),)) if is_constant((part,)) else part
            for i, part in enumerate(parts)
        ]
    )


def _are_of_rank(operands: Any, rank: int) -> bool:
    """Whether operands are tensors of one rank; `cat` also takes empty ones of rank 1."""
    is_list = isinstance(operands, tuple | list)
    return is_list and all(isinstance(n, fx.Node) and rank_of(n) == rank for n in operands)


def _side_by_side(node: fx.Node, shape: Sequence[Any], left: Tracks, right: Tracks) -> Tracks:
    """Combine the tracks of joined tensors: what one holds says nothing of the other."""
    return tuple(
        common(a, b) or unnamed(node, dim, shape, a, b)
        for dim, (a, b) in enumerate(zip(left, right, strict=True))
    )


@rule("stack")
def _stack(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    operands = argument(node, 0, "tensors")
    if shape is None or not _are_of_rank(operands, len(shape) - 1):
        return None
    dim = argument(node, 1, "dim", 0) % len(shape)
    constant = all(is_constant(track) for n in operands for track in analysis.of(n))
    added = stream(shape[dim], *(() if constant else ((node, dim),)))
    result: Tracks | None = None
    for operand in operands:
        tracks = analysis.of(operand)
        tracks = (*tracks[:dim], added, *tracks[dim:])
        result = tracks if result is None else _side_by_side(node, shape, result, tracks)
    return result


@rule("chunk", "split", "tensor_split", "split_with_sizes", "unbind")
def _split(analysis: Provenance, node: fx.Node) -> TrackValue:
    outputs, operand = example_value(node), operand_of(node)
    if not isinstance(operand, fx.Node) or not isinstance(outputs, tuple | list):
        return None
    unbind = op_name(node) == "unbind"
    dim = argument(node, 1 if unbind else 2, "dim", 0)
    if isinstance(dim, fx.Node):  # a dimension out of a config, under dynamic shapes
        dim = int(example_value(dim))
    dim, tracks = dim % rank_of(operand), analysis.of(operand)
    start: Any = 0
    result = []
    for i, output in enumerate(outputs):
        if unbind:
            result.append(replaced(tracks, dim))
            continue
        size = output.shape[dim]
        whole = slice_track(tracks[dim], start, start + size)
        piece = whole or _piece(tracks[dim], size, (node, i))
        result.append(replaced(tracks, dim, piece))
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
    items = index_items(index, rank_of(source))
    if items is None:
        return _gathered(analysis, node, source, index)
    return _index_tracks(analysis, node, source, items)


@rule("index")
def _index(analysis: Provenance, node: fx.Node) -> TrackValue:
    """Indexing by tensors as `aten::index` writes it: None where a dimension is kept."""
    source, given = operand_of(node), argument(node, 1, "indices")
    if not isinstance(source, fx.Node) or not isinstance(given, Sequence):
        return None
    index = tuple(slice(None) if item is None else item for item in given)
    return _gathered(analysis, node, source, index)


def _gathered(analysis: Provenance, node: fx.Node, source: fx.Node, index: Any) -> TrackValue:
    """Positions picked by tensors are in whatever order these say."""
    shape = shape_of(node)
    if shape is None:
        return None
    items = list(index) if isinstance(index, tuple) else [index]
    picked = [i for i, item in enumerate(items) if item != slice(None)]
    if len(picked) == 1 and len(shape) == rank_of(source) and items[picked[0]] is not Ellipsis:
        return moved_dims(analysis, node, picked)
    return scattered(node, shape, analysis.of(source))


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
            kept = slice_dim(tracks[dim], shape[dim], item)
            result.append(kept or unnamed(node, len(result), new_shape, tracks[dim]))
        dim += 1
    return tuple(result)


@rule("slice")
def _slice(analysis: Provenance, node: fx.Node) -> TrackValue:
    """A slice as `aten::slice` writes it: of one dimension, given by its number."""
    shape, operand = shape_of(node), operand_of(node)
    if shape is None or not isinstance(operand, fx.Node):
        return None
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    item = slice(start, end, argument(node, 4, "step", 1))
    tracks, sizes = analysis.of(operand), shape_of(operand) or ()
    kept = slice_dim(tracks[dim], sizes[dim], item)
    return replaced(tracks, dim, kept or unnamed(node, dim, shape, tracks[dim]))


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
