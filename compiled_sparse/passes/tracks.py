"""What the positions along one tensor dimension stand for.

A *track* describes one dimension as a concatenation of parts. A `VideoPart` says: index i is token
i of the raster order over some axes of a patch embedding's output. A `StreamPart` says: index i is
index i of some named origin, nothing more. A stream without origins (constants, parameters) proves
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from torch import fx

from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import size_key


@dataclass(frozen=True)
class VideoPart:
    """Raster order over axes of a patch embedding.

    Args:
        source: The node of the patch embedding.
        axes: Which of its grid axes longer than one, slowest first.
        grid: Length of every axis of the source.
    """

    source: fx.Node
    axes: tuple[int, ...]
    grid: tuple[Any, ...] = field(compare=False)

    @property
    def size(self) -> Any:
        """Number of positions."""
        return math.prod(self.grid[axis] for axis in self.axes)

    @property
    def is_whole_grid(self) -> bool:
        """Whether every axis of the source is in it, in order."""
        return self.axes == live_axes(self.grid)


def live_axes(grid: tuple[Any, ...], axes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the axes longer than one: the others never change a raster order."""
    chosen = range(len(grid)) if axes is None else axes
    return tuple(axis for axis in chosen if not same(grid[axis], 1))


def video(source: fx.Node, axes: Sequence[int], grid: tuple[Any, ...]) -> Track:
    """Return a track of one video part."""
    return (VideoPart(source, live_axes(grid, axes), grid),)


@dataclass(frozen=True)
class StreamPart:
    """Positions of something that is not known to be video.

    Args:
        origins: Identities the positions are known to share; empty for constants.
        size: Number of positions.
    """

    origins: frozenset[Any]
    size: Any = field(compare=False)


Part = VideoPart | StreamPart
Track = tuple[Part, ...]
Tracks = tuple[Track, ...]


def stream(size: Any, *origins: Any) -> Track:
    """Return a track of one stream."""
    return (StreamPart(frozenset(origins), size),)


def constant_tracks(shape: Sequence[Any]) -> Tracks:
    """Return tracks that prove nothing, for constants and parameters."""
    return tuple(stream(size) for size in shape)


def track_size(track: Track) -> Any:
    """Return the number of positions along a track."""
    return sum(part.size for part in track)


def is_constant(track: Track) -> bool:
    """Whether a track holds no evidence at all."""
    return all(isinstance(part, StreamPart) and not part.origins for part in track)


def has_video(track: Track) -> bool:
    """Whether any part of a track is video."""
    return any(isinstance(part, VideoPart) for part in track)


def merge(left: Track, right: Track) -> Track | None:
    """Combine the tracks of two operands that are aligned index by index.

    Video knowledge wins over a mere stream; two streams share their origins from then on.

    Args:
        left: Track of one operand's dimension.
        right: Track of the other's, of the same length.

    Returns:
        The combined track, or None where the two contradict each other.
    """
    if left == right or is_constant(right):
        return left
    if is_constant(left):
        return right
    if len(left) == len(right) == 1:
        return _merge_parts(left[0], right[0])
    if len(left) == len(right) and all(
        same(a.size, b.size) for a, b in zip(left, right, strict=True)
    ):
        merged = [_merge_parts(a, b) for a, b in zip(left, right, strict=True)]
        parts = [part for track in merged if track is not None for part in track]
        return tuple(parts) if len(parts) == len(left) else None
    if has_video(left) != has_video(right):
        return left if has_video(left) else right
    return None


def _merge_parts(left: Part, right: Part) -> Track | None:
    if isinstance(left, StreamPart) and isinstance(right, StreamPart):
        return (StreamPart(left.origins | right.origins, left.size),)
    if isinstance(left, VideoPart) and isinstance(right, VideoPart):
        return (left,) if _same_raster(left, right) else None
    return (left,) if isinstance(left, VideoPart) else (right,)


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
    if not same(left.size, right.size):
        return None
    if isinstance(left, VideoPart) and isinstance(right, VideoPart):
        return left if _same_raster(left, right) else None
    if isinstance(left, StreamPart) and isinstance(right, StreamPart):
        origins = left.origins & right.origins
        return StreamPart(origins, left.size) if origins else None
    return None


def _same_raster(left: VideoPart, right: VideoPart) -> bool:
    """Whether two patch embeddings, of a video and of its control signal, run over one grid."""
    grids = zip(left.grid, right.grid, strict=True)
    return left.axes == right.axes and all(same(a, b) for a, b in grids)


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
    if isinstance(query, VideoPart):
        return query == key == value
    if not isinstance(key, StreamPart) or not isinstance(value, StreamPart):
        return False
    same_tokens = query.origins == key.origins and bool(query.origins & value.origins)
    return same_tokens and same(query.size, key.size) and same(query.size, value.size)


def slice_track(track: Track, start: Any, stop: Any) -> Track | None:
    """Return the parts between two positions, or None if they cut through a part."""
    boundaries = [0]
    for part in track:
        boundaries.append(boundaries[-1] + part.size)
    first = [i for i, position in enumerate(boundaries) if same(position, start)]
    last = [i for i, position in enumerate(boundaries) if same(position, stop)]
    if not first or not last or first[0] >= last[-1]:
        return None
    return track[first[0] : last[-1]]


def reshape_tracks(
    shape: Sequence[Any], tracks: Tracks, new_shape: Sequence[Any], origin: Any
) -> Tracks:
    """Follow a reshape.

    Dimensions are grouped so that each group keeps its number of elements. A group that merges or
    splits along grid axes keeps the video knowledge; anything else becomes a new stream.

    Args:
        shape: Sizes before.
        tracks: Tracks before.
        new_shape: Sizes after.
        origin: Identity for the dimensions that cannot be followed.

    Returns:
        Tracks after.
    """
    groups = reshape_groups(shape, new_shape)
    result = [stream(size, (origin, i)) for i, size in enumerate(new_shape)]
    for old, new in groups or []:
        followed = _reshape_group([tracks[i] for i in old], [new_shape[i] for i in new])
        for i, track in zip(new, followed or [], strict=bool(followed)):
            result[i] = track
    return tuple(result)


def reshape_groups(
    shape: Sequence[Any], new_shape: Sequence[Any]
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
            if same(left_size, right_size):
                break
            source, sink = (old, left) if hint(left_size) < hint(right_size) else (new, right)
            if not source:
                return None
            sink.append(source.pop(0))
        groups.append((left, right))
    return groups


def _reshape_group(tracks: list[Track], sizes: list[Any]) -> list[Track] | None:
    if len(tracks) == len(sizes) == 1:
        return tracks
    if len(sizes) == 1:
        return [_merge_dims(tracks, sizes[0])]
    if len(tracks) == 1:
        return _split_dim(tracks[0], sizes)
    return None


def _merge_dims(tracks: list[Track], size: Any) -> Track:
    parts = [track[0] for track in tracks if len(track) == 1]
    videos = [part for part in parts if isinstance(part, VideoPart)]
    if len(videos) == len(tracks) and len({part.source for part in videos}) == 1:
        axes = tuple(axis for part in videos for axis in part.axes)
        grid = videos[0].grid
        if axes == live_axes(grid, range(axes[0], axes[-1] + 1)):
            return video(videos[0].source, axes, grid)
    if all(is_constant(track) for track in tracks):
        return stream(size)
    return stream(size, ("merged", tuple(tracks), tuple(size_key(track_size(t)) for t in tracks)))


def _split_dim(track: Track, sizes: list[Any]) -> list[Track] | None:
    part = track[0]
    if len(track) > 1:
        return None
    if isinstance(part, StreamPart):
        if is_constant(track):
            return [stream(size) for size in sizes]
        shape = tuple(map(size_key, sizes))
        return [stream(size, ("split", track, i, shape)) for i, size in enumerate(sizes)]
    axes = list(part.axes)
    result: list[Track] = []
    for size in sizes:
        taken: list[int] = []
        while axes and not (taken and same(math.prod(part.grid[a] for a in taken), size)):
            taken.append(axes.pop(0))
        if not taken or not same(math.prod(part.grid[axis] for axis in taken), size):
            return None
        result.append(video(part.source, taken, part.grid))
    return result if not axes else None
