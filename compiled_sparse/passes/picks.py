"""Which members of a batch a tensor is made of, where an index or a slice picked some.

The dimension they were picked from may be gone afterwards, so that no track tells of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.tracks import Atom
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import named_atoms
from compiled_sparse.passes.tracks import track_size

Pick = tuple[Track, Any]
"""A batch dimension, and what was picked from it."""

_SPLITS = frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unbind"})


def own_picks(node: fx.Node, operand: Tracks, result: Tracks) -> Iterator[Pick]:
    """Yield what an operation picks from the batch dimensions of its operand.

    Args:
        node: The operation.
        operand: Tracks of its operand, or of what a split was made of if it takes an element.
        result: Its own tracks.
    """
    for track in operand:
        if _is_of_batch(track) and track not in result:
            yield track, _what(node)


def source_of(node: fx.Node) -> fx.Node | None:
    """Return the tensor an operation picks from, None if it picks nothing."""
    name, source = op_name(node), next(iter(node.all_input_nodes), None)
    if name not in ("getitem", "__getitem__", "select", "slice", "narrow") or source is None:
        return None
    if shape_of(source) is not None:
        return source
    is_split = op_name(source) in _SPLITS
    return next(iter(source.all_input_nodes), None) if is_split else None


def _what(node: fx.Node) -> Any:
    """Name a pick, so that two equal ones are the same."""
    source = node.all_input_nodes[0]
    is_split = shape_of(source) is None
    split = (op_name(source), repr(source.args[1:]), repr(source.kwargs)) if is_split else ()
    return split, repr(node.args[1:]), repr(node.kwargs)


def _is_of_batch(track: Track) -> bool:
    """Whether a dimension is the first one of an input, or made of it, and of several members."""
    return not same(track_size(track), 1) and any(map(_is_first, atoms_of(track)))


def _is_first(atom: Atom) -> bool:
    return isinstance(atom, Stream) and any(map(_names_first, atom.origins))


def _names_first(origin: Any) -> bool:
    node, *rest = origin if isinstance(origin, tuple) else (origin,)
    if isinstance(node, fx.Node):
        return node.op == "placeholder" and rest == [0]
    return any(map(_is_first, named_atoms(origin)))
