"""Calls over some of this rank's tokens, or with other keys or queries, as far as tracks show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.tracks import Atom
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import named_atoms


def shares_tokens(site: Site, lengths: tuple[int, ...]) -> bool:
    """Whether the keys of a call with another number of queries may be this rank's tokens.

    Args:
        site: The call.
        lengths: How long a sequence of this rank's tokens is.
    """
    if set(_names(site.query_track)) & set(_names(site.key_track)):
        return True
    are_others = site.graph_has_video and not site.key_from_video
    return not are_others and hint(site.tensor("key").shape[-2]) in lengths


def is_of_split_tokens(site: Site, run: int) -> bool:
    """Whether a short sequence, such as a frame, was split off from this rank's tokens.

    Args:
        site: The call.
        run: This rank's tokens of the video.
    """
    tracks = site.query_track, site.batch_track
    if any(map(has_video, tracks)):
        return True
    atoms = (each for track in tracks for atom in atoms_of(track) for each in _made_of(atom))
    return any(isinstance(each, Stream) and hint(each.size) == run for each in atoms)


def begins_at(track: Track, run: int, before: int) -> bool:
    """Whether the video may begin where it is said: no part of its length is only elsewhere.

    Args:
        track: What its positions are.
        run: This rank's tokens of the video.
        before: Where the caller says they begin.
    """
    sizes = [hint(part.size) for part in track]
    places = [sum(sizes[:index]) for index, size in enumerate(sizes) if size == run]
    return not places or before in places


def _names(track: Track) -> Iterator[Any]:
    """The identities of a track's positions: origins of streams, and axes of a video."""
    for atom in atoms_of(track):
        yield from atom.origins if isinstance(atom, Stream) else (atom.axes,)


def _made_of(atom: Atom) -> Iterator[Atom]:
    """The atoms that a stream is a digit of, and what these are made of."""
    if not isinstance(atom, Stream):
        return
    for origin in atom.origins:
        for part in named_atoms(origin):
            yield part
            yield from _made_of(part)
