"""Tracks through reshapes and slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import size_key
from compiled_sparse.passes.tracks import Atom
from compiled_sparse.passes.tracks import Kind
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Piece
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import is_constant
from compiled_sparse.passes.tracks import part_of
from compiled_sparse.passes.tracks import stream
from compiled_sparse.passes.tracks import track_size

Equal = Callable[[Any, Any], bool]


def slice_track(track: Track, start: Any, stop: Any) -> Track | None:
    """Return the parts between two positions, or None if that cuts a part at a symbolic place."""
    boundaries = [0]
    for part in track:
        boundaries.append(boundaries[-1] + part.size)
    first = [i for i, position in enumerate(boundaries) if same(position, start)]
    last = [i for i, position in enumerate(boundaries) if same(position, stop)]
    if first and last:
        return track[first[0] : last[-1]] if first[0] < last[-1] else None
    if all(isinstance(position, int) for position in (*boundaries, start, stop)):
        return _runs(track, boundaries, start, stop) or None
    return None


def _runs(track: Track, boundaries: Sequence[int], start: int, stop: int) -> Track:
    return tuple(
        part.between(max(start - begin, 0), min(stop, end) - begin)
        for part, begin, end in zip(track, boundaries, boundaries[1:], strict=False)
        if max(start, begin) < min(stop, end)
    )


def joined(parts: Sequence[Part]) -> Track:
    """Return a track of parts, with runs that follow each other made one again."""
    result: list[Part] = []
    for part in parts:
        whole = result[-1].continued_by(part) if result else None
        if whole is None:
            result.append(part)
        else:
            result[-1] = whole
    return tuple(result)


def reshape_tracks(
    shape: Sequence[Any], tracks: Tracks, new_shape: Sequence[Any], origin: Any
) -> Tracks:
    """Follow a reshape.

    Dimensions are grouped so that each group keeps its number of elements. Within a group the
    atoms stay in order; each new dimension takes as many of them as make up its size.

    Args:
        shape: Sizes before.
        tracks: Tracks before.
        new_shape: Sizes after.
        origin: Identity for the dimensions that cannot be followed.

    Returns:
        Tracks after.
    """
    equal = _agree if any(_is_cut(atom) for track in tracks for atom in atoms_of(track)) else same
    groups = _reshape_groups(shape, new_shape, equal)
    constant = all(map(is_constant, tracks))
    result = [
        stream(size) if constant else stream(size, (origin, i)) for i, size in enumerate(new_shape)
    ]
    for old, new in groups or []:
        followed = _reshape_group([tracks[i] for i in old], [new_shape[i] for i in new], equal)
        for i, track in zip(new, followed or [], strict=bool(followed)):
            result[i] = track
    return tuple(result)


def _is_cut(atom: Atom) -> bool:
    return isinstance(atom, Piece) and atom.kind is Kind.LATENT


def _agree(left: Any, right: Any) -> bool:
    """Whether sizes are equal, by a guard if need be.

    An input cut into patches has sizes like `h // 2`; that they divide `h` is what the reshape asks
    for anyway, but not always known.
    """
    if same(left, right):
        return True
    is_hinted = hint(left) == hint(right) > 1
    return is_hinted and bool(left == right)


def _reshape_groups(
    shape: Sequence[Any], new_shape: Sequence[Any], equal: Equal
) -> list[tuple[list[int], list[int]]] | None:
    """Pair up runs of dimensions with provably equal products, ignoring sizes of one."""
    old = [i for i, size in enumerate(shape) if not same(size, 1)]
    new = [i for i, size in enumerate(new_shape) if not same(size, 1)]
    groups = []
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while True:
            left_size = math.prod(shape[i] for i in left)
            right_size = math.prod(new_shape[i] for i in right)
            if equal(left_size, right_size):
                break
            source, sink = (old, left) if hint(left_size) < hint(right_size) else (new, right)
            if not source:
                return None
            sink.append(source.pop(0))
        groups.append((left, right))
    return groups


def _reshape_group(tracks: list[Track], sizes: list[Any], equal: Equal) -> list[Track] | None:
    if len(tracks) == len(sizes) == 1:
        return tracks
    atoms = [atom for track in tracks for atom in _atoms(track)]
    result: list[Track] = []
    for size in sizes:
        taken = take(atoms, size, equal)
        if taken is None:
            return None
        result.append((part_of(taken),))
    return None if atoms else result


def _atoms(track: Track) -> tuple[Atom, ...]:
    """A dimension of several parts takes part in a reshape as one stream."""
    if len(track) == 1 and track[0].cut is None:
        return track[0].atoms
    if is_constant(track):
        return (Stream(frozenset(), track_size(track)),)
    sizes = tuple(size_key(part.size) for part in track)
    return (Stream(frozenset({("joined", track, sizes)}), track_size(track)),)


def take(atoms: list[Atom], size: Any, equal: Equal = same) -> list[Atom] | None:
    """Take the slowest `size` positions' worth of atoms off a list, splitting the last of them.

    Args:
        atoms: Atoms of a raster, slowest first; what is taken is removed.
        size: Number of positions.
        equal: Tells whether two sizes are equal.

    Returns:
        The atoms, or None if they do not come out at this size.
    """
    taken: list[Atom] = []
    missing = size
    while not same(missing, 1):
        if not atoms:
            return None
        atom = atoms.pop(0)
        rest = missing // atom.size if hint(atom.size) <= hint(missing) else None
        if rest is not None and equal(rest * atom.size, missing):
            taken.append(atom)
            missing = rest
            continue
        inner = atom.size // missing
        if rest is not None or not equal(inner * missing, atom.size):
            return None
        outer, fast = atom.digits(missing)
        atoms.insert(0, fast)
        taken.append(outer)
        missing = 1
    return taken or [Stream(frozenset(), 1)]
