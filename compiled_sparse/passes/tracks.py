"""What the positions along one tensor dimension stand for.

A *track* describes one dimension as a concatenation of *parts*; a part is the raster order over one
or more *atoms*, slowest first. An atom is a `Piece` of a known axis (of a patch embedding's output,
of an input, of a table of positions) or a `Stream`: index i is index i of some named origins,
nothing more. A stream without origins (constants, parameters) proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from enum import Enum
from typing import Any
from typing import NamedTuple

from torch import fx

from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import size_key


class Kind(Enum):
    """What the axes of a tensor are."""

    LATENT = "dimensions of a 4-D or 5-D tensor before patching: image, video, or neither"
    GRID = "output of a patch embedding: video tokens"
    POSITIONS = "table of positions built in the graph"


class Reader(NamedTuple):
    """Where a length can be read: the size of `node` along `dim`."""

    node: fx.Node
    dim: int


@dataclass(frozen=True)
class Axes:
    """Axes of one tensor.

    Args:
        node: Where they start.
        kind: What they are.
        sizes: Length of each.
        readers: Where each length can be read, if anywhere.
    """

    node: fx.Node
    kind: Kind
    sizes: tuple[Any, ...] = field(compare=False)
    readers: tuple[Reader | None, ...] = field(compare=False)

    @property
    def live(self) -> tuple[int, ...]:
        """The axes longer than one: the others never change a raster order."""
        return tuple(axis for axis, size in enumerate(self.sizes) if not same(size, 1))


@dataclass(frozen=True)
class Piece:
    """An axis, or a digit of it: position i stands for `(x // step) % size` of coordinate x.

    Args:
        axes: The tensor's axes.
        axis: Which of them.
        key: Hashable form of size and step.
        size: Number of positions.
        step: Coordinates per position.
        is_outer: Whether it is the slowest digit, so that its order is the axis's own.
        reader: Where the size can be read, if anywhere.
    """

    axes: Axes
    axis: int
    key: tuple[Any, Any]
    size: Any = field(compare=False)
    step: Any = field(compare=False)
    is_outer: bool = field(compare=False)
    reader: Reader | None = field(default=None, compare=False)

    @property
    def kind(self) -> Kind:
        """What the axes are."""
        return self.axes.kind

    @property
    def is_whole(self) -> bool:
        """Whether it is the axis, not a digit of it."""
        return self.is_outer and same(self.step, 1)

    def digits(self, outer: Any) -> tuple[Piece, Piece]:
        """Split into `outer` positions and the rest."""
        inner = self.size // outer
        slow = _piece(self.axes, self.axis, outer, self.step * inner, is_outer=self.is_outer)
        return slow, _piece(self.axes, self.axis, inner, self.step, is_outer=False)

    def followed_by(self, other: Atom) -> Piece | None:
        """Join with the digit below it."""
        if not isinstance(other, Piece) or (self.axes, self.axis) != (other.axes, other.axis):
            return None
        if other.is_outer or not same(self.step, other.step * other.size):
            return None
        size = self.size * other.size
        return _piece(self.axes, self.axis, size, other.step, is_outer=self.is_outer)


def _piece(axes: Axes, axis: int, size: Any, step: Any, *, is_outer: bool) -> Piece:
    return Piece(axes, axis, (size_key(size), size_key(step)), size, step, is_outer)


@dataclass(frozen=True)
class Stream:
    """Positions of something that is not known to be video.

    Args:
        origins: Identities the positions are known to share; empty for constants.
        size: Number of positions.
        positions: Tables of positions its tokens were multiplied by: each the pieces of a raster.
    """

    origins: frozenset[Any]
    size: Any = field(compare=False)
    positions: frozenset[tuple[Piece, ...]] = frozenset()

    def digits(self, outer: Any) -> tuple[Stream, Stream]:
        """Split into `outer` positions and the rest; the same split gives the same names."""
        inner = self.size // outer
        if not self.origins:
            return Stream(self.origins, outer), Stream(self.origins, inner)
        slow, fast = (("digit", self, size_key(outer), i) for i in range(2))
        return Stream(frozenset({slow}), outer), Stream(frozenset({fast}), inner)

    def followed_by(self, other: Atom) -> Stream | None:
        """Join with the digit below it."""
        if not isinstance(other, Stream) or not len(self.origins) == len(other.origins) == 1:
            return None
        (slow,), (fast,) = self.origins, other.origins
        if not (isinstance(slow, tuple) and isinstance(fast, tuple) and slow[0] == "digit"):
            return None
        whole = slow[1]
        is_next = slow[3:] == (0,) and fast == (*slow[:3], 1)
        return whole if is_next and isinstance(whole, Stream) else None


Atom = Piece | Stream


@dataclass(frozen=True)
class Part:
    """Raster order over atoms, slowest first.

    Args:
        atoms: At least one.
        cut: First position and the one behind the last, where it is only a run of the raster.
    """

    atoms: tuple[Atom, ...]
    cut: tuple[int, int] | None = None

    @property
    def size(self) -> Any:
        """Number of positions."""
        if self.cut is not None:
            return self.cut[1] - self.cut[0]
        return math.prod(atom.size for atom in self.atoms)

    def between(self, start: int, stop: int) -> Part:
        """Return a run of its positions."""
        if (start, stop) == (0, self.size):
            return self
        first = 0 if self.cut is None else self.cut[0]
        return Part(self.atoms, (first + start, first + stop))

    def continued_by(self, other: Part) -> Part | None:
        """Join with the run behind it."""
        if self.cut is None or other.cut is None or self.atoms != other.atoms:
            return None
        if self.cut[1] != other.cut[0]:
            return None
        whole = Part(self.atoms)
        return whole.between(self.cut[0], other.cut[1])

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Those of its atoms that are known axes."""
        return tuple(atom for atom in self.atoms if isinstance(atom, Piece))

    @property
    def is_video(self) -> bool:
        """Whether any of its atoms is an axis of a patch embedding."""
        return any(piece.kind is Kind.GRID for piece in self.pieces)


Track = tuple[Part, ...]
Tracks = tuple[Track, ...]


def part_of(atoms: Sequence[Atom]) -> Part:
    """Join digits that belong together; sizes of one never change a raster order."""
    joined: list[Atom] = []
    for atom in atoms:
        if same(atom.size, 1) and len(atoms) > 1:
            continue
        whole = joined[-1].followed_by(atom) if joined else None
        if whole is None:
            joined.append(atom)
        else:
            joined[-1] = whole
    return Part(tuple(joined or atoms[:1]))


def stream(size: Any, *origins: Any) -> Track:
    """Return a track of one stream."""
    return (Part((Stream(frozenset(origins), size),)),)


def axis_track(axes: Axes, axis: int) -> Track:
    """Return the track of a dimension that is one axis; a single position needs no name."""
    size = axes.sizes[axis]
    if same(size, 1):
        return stream(1)
    piece = _piece(axes, axis, size, 1, is_outer=True)
    return (Part((replace(piece, reader=axes.readers[axis]),)),)


def latent_axes(node: fx.Node, shape: Sequence[Any]) -> Axes:
    """Return the dimensions of a tensor that may be patched later."""
    readers = tuple(Reader(node, dim) for dim in range(len(shape)))
    return Axes(node, Kind.LATENT, tuple(shape), readers)


def constant_tracks(shape: Sequence[Any]) -> Tracks:
    """Return tracks that prove nothing, for constants and parameters."""
    return tuple(stream(size) for size in shape)


def track_size(track: Track) -> Any:
    """Return the number of positions along a track."""
    return sum(part.size for part in track)


def atoms_of(track: Track) -> Iterator[Atom]:
    """Yield the atoms of all parts."""
    for part in track:
        yield from part.atoms


def named_atoms(origin: Any) -> tuple[Atom, ...]:
    """Return the atoms that a stream's name was made of; names of nodes are made of none."""
    match origin:
        case ("digit" | "run", whole, *_):
            return (whole,)
        case ("fused", part, *_):
            return tuple(part.atoms)
        case ("flipped", track):
            return tuple(atoms_of(track))
        case ("rearranged", _, _, sources):
            return tuple(sources)
    return ()


def sole_piece(track: Track) -> Piece | None:
    """Return the piece a dimension consists of, or None if there is anything else."""
    if len(track) != 1 or len(track[0].atoms) != 1 or track[0].cut is not None:
        return None
    atom = track[0].atoms[0]
    return atom if isinstance(atom, Piece) else None


def readable(node: fx.Node, tracks: Tracks) -> Tracks:
    """Note that the sizes of pieces that are a dimension of `node` can be read there."""
    return tuple(
        (Part((replace(piece, reader=Reader(node, dim)),)),)
        if (piece := sole_piece(track)) is not None and piece.reader is None
        else track
        for dim, track in enumerate(tracks)
    )


def is_constant(track: Track) -> bool:
    """Whether a track says nothing about which tokens these are; positions are constants."""
    return all(
        atom.kind is Kind.POSITIONS if isinstance(atom, Piece) else not atom.origins
        for atom in atoms_of(track)
    )


def is_bare(track: Track) -> bool:
    """Whether a track holds no evidence at all."""
    return all(isinstance(atom, Stream) and not atom.origins for atom in atoms_of(track))


def has_video(track: Track) -> bool:
    """Whether any part of a track is video."""
    return any(part.is_video for part in track)
