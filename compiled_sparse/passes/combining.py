"""What is known of a tensor that is made of two others, aligned index by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import size_key
from compiled_sparse.passes.rearranged import mixes_orders
from compiled_sparse.passes.tracks import Atom
from compiled_sparse.passes.tracks import Kind
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Piece
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import is_bare
from compiled_sparse.passes.tracks import is_constant


def same_raster(left: Sequence[Atom], right: Sequence[Atom]) -> bool:
    """Whether two tensors' axes, of a video and of its control signal, run over one grid."""
    return len(left) == len(right) and all(map(_same_digit, left, right))


def _same_digit(left: Atom, right: Atom) -> bool:
    if isinstance(left, Stream) or isinstance(right, Stream):
        return type(left) is type(right) and same(left.size, right.size)
    digits = [(p.axis, p.key, p.kind, p.is_outer, len(p.axes.sizes)) for p in (left, right)]
    return digits[0] == digits[1]


def merge(left: Track, right: Track, *, positions: bool = False) -> Track | None:
    """Combine the tracks of two operands that are aligned index by index.

    Video knowledge wins over a mere stream; two streams share their origins from then on, as do the
    parts of a sequence and a stream over all of it.

    Args:
        left: Track of one operand's dimension.
        right: Track of the other's, of the same length.
        positions: Whether a table of positions leaves its mark on tokens, as in a rotation.

    Returns:
        The combined track, or None where the two contradict each other.
    """
    if left == right or is_bare(right):
        return left
    if is_bare(left):
        return right
    if mixes_orders(left, right):
        return None
    if _aligned(left, right):
        merged = [_merge_parts(a, b, positions) for a, b in zip(left, right, strict=True)]
        parts = tuple(part for part in merged if part is not None)
        return parts if len(parts) == len(left) else None
    for winner, other in ((left, right), (right, left)):
        if is_constant(other) or (has_video(winner) and not has_video(other)):
            return winner
    for parts, other in ((left, right), (right, left)):
        whole = _sole_stream(other)
        if whole is not None and len(parts) > 1 and not has_video(parts):
            runs = _runs_alike(whole, parts)
            return tuple(Part((_union(fused(p), run),)) for p, run in zip(parts, runs, strict=True))
    return None


def _sole_stream(track: Track) -> Stream | None:
    (part, *more) = track
    (atom, *rest) = part.atoms
    is_sole = not more and not rest and part.cut is None
    return _as_stream(atom) if is_sole and not _is_known(atom) else None


def _runs_alike(whole: Stream, parts: Track) -> list[Stream]:
    """Cut a stream, such as a rotary table over text and video, where the parts of another end."""
    runs, start = [], 0
    for part in parts:
        name = ("run", whole, size_key(start), size_key(part.size))
        runs.append(Stream(frozenset({name}), part.size))
        start = start + part.size
    return runs


def _aligned(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(
        same(a.size, b.size) for a, b in zip(left, right, strict=True)
    )


def _merge_parts(left: Part, right: Part, positions: bool) -> Part | None:
    if left == right:
        return left
    for winner, other in ((left, right), (right, left)):
        if is_bare((other,)):
            return winner
        if is_constant((other,)) and not is_constant((winner,)):
            return _with_positions(winner, other) if positions else winner
        if winner.is_video and not other.is_video:
            return winner
    if left.is_video or is_constant((left,)):
        if left.cut == right.cut and same_raster(left.atoms, right.atoms):
            return left
        return _frames_beside_a_video(left, right) or _frames_beside_a_video(right, left)
    if left.cut is None and right.cut is None and _aligned(left.atoms, right.atoms):
        return Part(tuple(map(_union, left.atoms, right.atoms)))
    return Part((_union(fused(left), fused(right)),))


def _frames_beside_a_video(run: Part, video: Part) -> Part | None:
    """Some frames of a video and as many of a signal that controls only these."""
    if run.cut is None or video.cut is not None or not run.is_video or not video.is_video:
        return None
    (frames, *more), (others, *rest) = run.atoms, video.atoms
    if more or rest or not isinstance(frames, Piece) or not isinstance(others, Piece):
        return None
    ranks = len(frames.axes.sizes), len(others.axes.sizes)
    fits = frames.is_whole and others.is_whole and ranks[0] == ranks[1]
    return run if fits and frames.axis == others.axis else None


def _with_positions(tokens: Part, table: Part) -> Part:
    """Mark tokens with a table that runs over several axes; a mere count says nothing."""
    raster = table.pieces
    if tokens.is_video or table.cut or len(raster) != len(table.atoms) or len(raster) < 2:
        return tokens
    atom = fused(tokens)
    return Part((replace(atom, positions=atom.positions | {raster}),))


def _union(left: Atom, right: Atom) -> Atom:
    if left == right:
        return left
    left, right = _as_stream(left), _as_stream(right)
    origins = left.origins | right.origins
    return Stream(origins, left.size, left.positions | right.positions)


def _as_stream(atom: Atom) -> Stream:
    return atom if isinstance(atom, Stream) else fused(Part((atom,)))


def fused(part: Part) -> Stream:
    """Return one stream for all atoms, under a name that only the same atoms give."""
    (first, *rest) = part.atoms
    if not rest and part.cut is None and isinstance(first, Stream):
        return first
    sizes = tuple(size_key(atom.size) for atom in part.atoms)
    origins = frozenset({("fused", part, sizes)} if not is_bare((part,)) else ())
    return Stream(origins, part.size)


def common(left: Track, right: Track) -> Track | None:
    """What is true of both of two tracks, where none mixes with the other.

    Args:
        left: Track of one tensor's dimension.
        right: Track of the other's, of the same length.

    Returns:
        The same video, or the origins both streams have; None where there is nothing.
    """
    if left == right:
        return left
    if len(left) != len(right):
        return None
    shared = [_common_part(a, b) for a, b in zip(left, right, strict=True)]
    parts = tuple(part for part in shared if part is not None)
    return parts if len(parts) == len(left) else None


def _common_part(left: Part, right: Part) -> Part | None:
    for bare, table in ((left, right), (right, left)):
        if is_bare((bare,)) and is_constant((table,)) and same(bare.size, table.size):
            return table
    if len(left.atoms) != len(right.atoms) or left.cut or right.cut:
        left, right = Part((fused(left),)), Part((fused(right),))
    shared = [_common_atom(a, b) for a, b in zip(left.atoms, right.atoms, strict=True)]
    atoms = tuple(atom for atom in shared if atom is not None)
    return Part(atoms) if len(atoms) == len(left.atoms) else None


def _common_atom(left: Atom, right: Atom) -> Atom | None:
    if left == right:
        return left
    if _is_known(left) or _is_known(right):
        return left if same_raster((left,), (right,)) else None
    left, right = _as_stream(left), _as_stream(right)
    origins = left.origins & right.origins
    if not origins or not same(left.size, right.size):
        return None
    return Stream(origins, left.size, left.positions | right.positions)


def refines(new: Track, old: Track) -> bool:
    """Whether a track is over the same streams as another, perhaps with something added to them."""
    return _aligned(new, old) and all(map(_refines_part, new, old))


def _refines_part(new: Part, old: Part) -> bool:
    if new == old:
        return True
    if any(_is_known(atom) for atom in (*new.atoms, *old.atoms)):
        return False
    return bool(fused(old).origins) and fused(old).origins <= fused(new).origins


def _is_known(atom: Atom) -> bool:
    return isinstance(atom, Piece) and atom.kind is not Kind.LATENT


def shares_provenance(query: Track, key: Track, value: Track) -> bool:
    """Whether queries, keys and values provably run over the same positions of the same tokens.

    Queries and keys must agree in every origin: something that was merely added to both, such as a
    table of positions, does not make two sequences one.

    Args:
        query: Track of the queries' length dimension.
        key: Track of the keys'.
        value: Track of the values'.

    Returns:
        True only if part by part all are the same video or the same stream.
    """
    if not len(query) == len(key) == len(value):
        return False
    return all(_same_part(*parts) for parts in zip(query, key, value, strict=True))


def _same_part(query: Part, key: Part, value: Part) -> bool:
    if query.is_video:
        return query == key == value
    parts = (query, key, value)
    if any(p.cut for p in parts) or any(len(a.atoms) != len(b.atoms) for a, b in pairwise(parts)):
        query, key, value = (Part((fused(part),)) for part in parts)
    return all(map(_same_tokens, query.atoms, key.atoms, value.atoms))


def _same_tokens(query: Atom, key: Atom, value: Atom) -> bool:
    if any(map(_is_known, (query, key, value))):
        return False
    q, k, v = map(_as_stream, (query, key, value))
    same_tokens = q.origins == k.origins and bool(q.origins & v.origins)
    return same_tokens and same(q.size, k.size) and same(q.size, v.size)
