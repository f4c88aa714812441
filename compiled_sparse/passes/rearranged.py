"""Tokens that an operation put in another order, and what they must not be mixed with.

A rearranged dimension is a stream whose name holds what it was made of. Adding a video to a stream
normally leaves it the video; but `t * (1 - m) + t[:, order] * m` may be nothing but `t[:, order]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from compiled_sparse.passes.tracks import Atom
from compiled_sparse.passes.tracks import Piece
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import is_bare
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import named_atoms
from compiled_sparse.passes.tracks import stream

_REARRANGED = "rearranged"
_FLIPPED = "flipped"


def rearranged(node: fx.Node, dim: int, size: Any, *before: Track) -> Track:
    """Return the track of a dimension that `node` put in another order.

    Args:
        node: The operation.
        dim: The dimension of its result.
        size: Its length.
        *before: What it was made of.
    """
    if all(map(is_bare, before)):
        return stream(size)
    sources = frozenset(atom for track in before for atom in atoms_of(track))
    return stream(size, (_REARRANGED, node, dim, sources))


def flipped(track: Track, size: Any) -> Track:
    """Return the track of a dimension in reverse; reversed twice it is what it was.

    Args:
        track: What is reversed.
        size: Its length.
    """
    if is_bare(track):
        return stream(size)
    atoms = tuple(atoms_of(track))
    origins = atoms[0].origins if len(atoms) == 1 and isinstance(atoms[0], Stream) else frozenset()
    for origin in origins if len(origins) == 1 and track[0].cut is None else ():
        if isinstance(origin, tuple) and origin[0] == _FLIPPED:
            before: Track = origin[1]
            return before
    return stream(size, (_FLIPPED, track))


def contradiction(node: fx.Node, dim: int, size: Any, left: Track, right: Track) -> Track:
    """Return the track of a dimension made of two that are not known to be aligned."""
    if any(has_video(track) or is_rearranged(track) for track in (left, right)):
        return rearranged(node, dim, size, left, right)
    constant = is_constant(left) and is_constant(right)
    return stream(size, *(() if constant else ((node, dim),)))


def is_rearranged(track: Track) -> bool:
    """Whether any of a track's tokens were put in another order."""
    return next(_sources(track), None) is not None


def mixes_orders(left: Track, right: Track) -> bool:
    """Whether one track is made of the other's tokens in another order."""
    return _is_made_of(left, right) or _is_made_of(right, left)


def _is_made_of(track: Track, other: Track) -> bool:
    sources = list(_sources(track))
    return any(_overlap(source, atom) for source in sources for atom in atoms_of(other))


def _overlap(left: Atom, right: Atom) -> bool:
    if isinstance(left, Piece) and isinstance(right, Piece):
        return left.axes == right.axes
    if isinstance(left, Stream) and isinstance(right, Stream):
        return bool(left.origins & right.origins)
    return False


def _sources(track: Track) -> Iterator[Atom]:
    for atom in atoms_of(track):
        yield from _sources_of(atom)


def _sources_of(atom: Atom) -> Iterator[Atom]:
    for origin in atom.origins if isinstance(atom, Stream) else ():
        for inner in named_atoms(origin):
            if origin[0] in (_REARRANGED, _FLIPPED):
                yield inner
            yield from _sources_of(inner)
