"""How writes into tensors move tracks. Importing this module registers the rules.

A write in place changes what every view of the memory holds: `Provenance.overwrite` sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.combining import common
from compiled_sparse.passes.combining import refines
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.op_names import WRITING_POINTWISE
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.provenance_rules import argument
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.provenance_rules import pointwise
from compiled_sparse.passes.provenance_shapes import index_items
from compiled_sparse.passes.provenance_shapes import slice_dim
from compiled_sparse.passes.rearranged import is_rearranged
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import stream
from compiled_sparse.passes.tracks import track_size


@rule(*WRITING_POINTWISE)
def _writing_pointwise(analysis: Provenance, node: fx.Node) -> TrackValue:
    target, result = operand_of(node), pointwise(analysis, node)
    if not isinstance(target, fx.Node) or result is None:
        analysis.lose(node)
        return None
    old = analysis.of(target)
    # What a tensor held stays where it was; only where nothing was known there is news.
    pairs = zip(old, result, strict=True)
    tracks = tuple(
        new if is_constant(track) or is_rearranged(new) else track for track, new in pairs
    )
    analysis.overwrite(node, target, tracks)
    return tracks


@rule("setitem")
def _setitem(analysis: Provenance, node: fx.Node) -> TrackValue:
    target, index, value = node.args
    assert isinstance(target, fx.Node)
    _write(analysis, node, target, index_items(index, len(shape_of(target) or ())), value)
    return None


@rule("copy_")
def _copy(analysis: Provenance, node: fx.Node) -> TrackValue:
    """A write as `torch.export` records it: into slices of a tensor, taken one by one."""
    target: Any = node.args[0] if len(node.args) > 1 else None
    if not isinstance(target, fx.Node):
        analysis.lose(node)
        return None
    items: list[Any] = [slice(None)] * len(shape_of(target) or ())
    while target.target is torch.ops.aten.slice.Tensor:
        dim = int(argument(target, 1, "dim", 0)) % len(items)
        if items[dim] != slice(None):
            analysis.lose(node)  # a slice of a slice
            return None
        start, end = argument(target, 2, "start"), argument(target, 3, "end")
        items[dim] = slice(start, end, argument(target, 4, "step", 1))
        target = target.args[0]
    _write(analysis, node, target, items, node.args[1])
    return analysis.of(node.args[0])  # what it wrote to is what it returns


def _write(
    analysis: Provenance, node: fx.Node, target: fx.Node, items: list[Any] | None, value: Any
) -> None:
    """Note that `node` wrote a value to the places of a tensor that `items` index."""
    old, shape = analysis.of(target), shape_of(target) or ()
    written = _without_spread_dims(analysis, value)
    new = None if items is None else _written_tracks(node, old, shape, items, written)
    if new is None and any(has_video(track) for track in old):
        analysis.lose(node)
    else:
        unknown = tuple(stream(size, (node, dim)) for dim, size in enumerate(shape))
        analysis.overwrite(node, target, unknown if new is None else new)


def _without_spread_dims(analysis: Provenance, value: Any) -> Tracks:
    """Tracks of a written value; sizes of one are spread over positions and prove nothing."""
    if not isinstance(value, fx.Node) or shape_of(value) is None:
        return ()
    sizes = shape_of(value) or ()
    tracks = analysis.of(value)
    return tuple(stream(1) if same(s, 1) else t for s, t in zip(sizes, tracks, strict=True))


def _written_tracks(
    node: fx.Node, old: Tracks, shape: Sequence[Any], items: list[Any], written: Tracks
) -> Tracks | None:
    """Tracks of a tensor after a write, or None if the write cannot be followed.

    What stays of the old content must agree, index by index, with what is written beside it.
    """
    if not written:
        return old
    kept_dims = [dim for dim, item in enumerate(items) if isinstance(item, slice)]
    if None in items or len(written) > len(kept_dims):
        return None
    whole = [_is_whole(track, size, i) for track, size, i in zip(old, shape, items, strict=True)]
    spread = [stream(1)] * (len(kept_dims) - len(written))
    new = dict(zip(kept_dims, [*spread, *written], strict=True))
    result: list[Track] = []
    for dim, track in enumerate(old):
        constant = is_constant(track) and all(map(is_constant, written))
        fresh = stream(shape[dim], *(() if constant else ((node, dim),)))
        if not whole[dim]:
            joined = _partly_written(track, shape[dim], items[dim], new.get(dim), fresh)
        elif all(whole):
            joined = stream(shape[dim]) if is_constant(new[dim]) else new[dim]
        else:
            joined = _beside(track, new[dim], fresh)
        if joined is None:
            return None
        result.append(joined)
    return tuple(result)


def _is_whole(track: Track, size: Any, item: Any) -> bool:
    return isinstance(item, slice) and slice_dim(track, size, item) == track


def _partly_written(
    old: Track, size: Any, item: Any, new: Track | None, fresh: Track
) -> Track | None:
    """Positions stay what they are where the same tokens are written back."""
    if not isinstance(item, slice):
        return None if has_video(old) else fresh
    replaced = slice_dim(old, size, item)
    if replaced is not None and new == replaced:
        return old
    if has_video(old):
        return None
    if replaced is None or new is None or not refines(new, replaced):
        return fresh
    return _with_run(old, size, item, new) or fresh


def _with_run(old: Track, size: Any, item: slice, new: Track) -> Track | None:
    """A sequence of which one run of tokens, in their places, was written anew."""
    before = () if not item.start else slice_dim(old, size, slice(0, item.start))
    ends = item.stop is None or same(item.stop, size)
    after = () if ends else slice_dim(old, size, slice(item.stop, None))
    return None if before is None or after is None else (*before, *new, *after)


def _beside(old: Track, new: Track, fresh: Track) -> Track | None:
    """Old and new content share a dimension of which both hold all positions."""
    if is_constant(new):
        # Another table may hold the same places in another order; what is spread has no order.
        other = is_constant(old) and new != old and same(track_size(new), track_size(old))
        return fresh if other else old
    if is_constant(old):
        return new
    return common(old, new) or (None if has_video(old) else fresh)
