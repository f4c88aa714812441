"""Where grids begin: patch embeddings. Importing this module registers the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.provenance_rules import argument
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.provenance_rules import rank_of
from compiled_sparse.passes.tracks import Axes
from compiled_sparse.passes.tracks import Kind
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Piece
from compiled_sparse.passes.tracks import Reader
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import axis_track
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import part_of
from compiled_sparse.passes.tracks import sole_piece
from compiled_sparse.passes.tracks import stream

Names = dict[Piece, Track]


def _start_grid(
    analysis: Provenance, node: fx.Node, sizes: Sequence[Any], readers: Sequence[Reader | None]
) -> Axes:
    analysis.start_video(node)
    return Axes(node, Kind.GRID, tuple(sizes), tuple(readers))


def _renamed(track: Track, names: Names) -> Track:
    """Call input axes by the names they have as axes of a grid."""
    return tuple(_renamed_part(part, names) for part in track)


def _renamed_part(part: Part, names: Names) -> Part:
    if not any(atom in names for atom in part.atoms):
        return part
    renamed = part_of([new for atom in part.atoms for new in _new_atoms(atom, names)])
    return replace(renamed, cut=part.cut)


def _new_atoms(atom: Any, names: Names) -> Sequence[Any]:
    return names[atom][0].atoms if atom in names else (atom,)


def _is_ascending(pieces: Sequence[Piece]) -> bool:
    """Whether axes of inputs of one rank come in the inputs' own order."""
    return all(
        a.axis < b.axis and len(a.axes.sizes) == len(b.axes.sizes) for a, b in pairwise(pieces)
    )


def _pieces(tracks: Sequence[Track], kind: Kind) -> list[Piece]:
    atoms = [atom for track in tracks for atom in atoms_of(track)]
    return [atom for atom in atoms if isinstance(atom, Piece) and atom.kind is kind]


@rule("conv2d", "conv3d")
def _convolution(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape, operand = shape_of(node), operand_of(node)
    if shape is None or len(shape) != (4 if op_name(node) == "conv2d" else 5):
        return None
    tracks = analysis.of(operand)
    if any(map(has_video, tracks[2:])):
        return _convolved_grid(analysis, node, operand, shape)
    if analysis.is_from_video(operand):
        return None  # tokens whose order was lost on the way are no fresh input
    latents = [piece for track in tracks[2:] if (piece := _latent(track)) is not None]
    if not _is_ascending(latents):
        return None
    sizes: list[Any] = list(shape[2:])
    readers: list[Reader | None] = [Reader(node, dim) for dim in range(2, len(shape))]
    frames = _folded_frames(tracks[0], latents) if len(shape) == 4 else None
    if frames is not None:
        sizes, readers = [frames.size, *sizes], [frames.reader, *readers]
    elif len(shape) == 4 and _is_one_frame(tracks[1], latents):
        sizes, readers = [1, *sizes], [None, *readers]
    axes = _start_grid(analysis, node, sizes, readers)
    batch = _renamed(tracks[0], {frames: axis_track(axes, 0)}) if frames else tracks[0]
    start = len(sizes) - len(shape[2:])
    grid = [axis_track(axes, start + i) for i in range(len(shape[2:]))]
    return (batch, stream(shape[1], (node, 1)), *grid)


def _latent(track: Track) -> Piece | None:
    piece = sole_piece(track)
    return piece if piece is not None and piece.kind is Kind.LATENT else None


def _folded_frames(batch: Track, latents: Sequence[Piece]) -> Piece | None:
    """The frames axis of a 5-D input that was folded into the batch, if one provably was."""
    folded = _pieces([batch], Kind.LATENT)
    if len(folded) != 1 or len(latents) != 2 or len(batch) != 1:
        return None
    (frames,) = folded
    is_5d = len(frames.axes.sizes) == 5
    return frames if is_5d and frames.is_outer and _is_ascending([frames, *latents]) else None


def _is_one_frame(channels: Track, latents: Sequence[Piece]) -> bool:
    """Whether height and width are those of a 5-D input that has a single frame."""
    if len(latents) != 2 or len(latents[0].axes.sizes) != 5:
        return False
    channel = _latent(channels)
    frames = {1, 2} - ({channel.axis} if channel is not None else set())
    return any(same(latents[0].axes.sizes[axis], 1) for axis in frames)


def _convolved_grid(
    analysis: Provenance, node: fx.Node, operand: fx.Node, shape: Sequence[Any]
) -> TrackValue:
    """A convolution over an axis keeps its order; one that keeps its length keeps the tokens."""
    tracks, before = analysis.of(operand), shape_of(operand) or ()
    kernel = (shape_of(argument(node, 1, "weight")) or ())[2:]
    pieces = [sole_piece(track) for track in tracks[2:]]
    channels = stream(shape[1], (node, 1))
    if _has_unit_stride(node) and all(map(same, before[2:], shape[2:])):
        kept = [
            track if same(extent, 1) or (piece is not None and piece.is_whole) else None
            for track, piece, extent in zip(tracks[2:], pieces, kernel, strict=True)
        ]
        fresh = [stream(size, (node, i + 2)) for i, size in enumerate(shape[2:])]
        return (tracks[0], channels, *(k or f for k, f in zip(kept, fresh, strict=True)))
    grid = _pieces(tracks, Kind.GRID)
    if not _are_a_grid(grid) or any(piece not in grid for piece in pieces):
        return None
    return _coarser_grid(analysis, node, tracks, shape, sorted(grid, key=lambda p: p.axis))


def _has_unit_stride(node: fx.Node) -> bool:
    stride = argument(node, 3, "stride", 1)
    return all(same(s, 1) for s in (stride if isinstance(stride, Sequence) else [stride]))


def _are_a_grid(pieces: Sequence[Piece]) -> bool:
    """Whether these are all axes of one grid, each once."""
    axes = sorted(piece.axis for piece in pieces)
    return (
        len({piece.axes for piece in pieces}) == 1
        and all(piece.is_outer for piece in pieces)
        and tuple(axes) == pieces[0].axes.live
    )


def _coarser_grid(
    analysis: Provenance,
    node: fx.Node,
    tracks: Tracks,
    shape: Sequence[Any],
    grid: Sequence[Piece],
) -> TrackValue:
    """Axes of another length start a grid of their own; folded ones go along."""
    dims = {sole_piece(track): dim for dim, track in enumerate(tracks) if dim > 1}
    convolved = [piece for piece in grid if piece in dims]
    if [dims[piece] for piece in convolved] != list(range(2, len(shape))):
        return None
    sizes, readers = list(grid[0].axes.sizes), list(grid[0].axes.readers)
    for piece in grid:
        dim = dims.get(piece)
        sizes[piece.axis] = piece.size if dim is None else shape[dim]
        readers[piece.axis] = piece.reader if dim is None else Reader(node, dim)
    axes = _start_grid(analysis, node, sizes, readers)
    names = {piece: axis_track(axes, piece.axis) for piece in grid}
    return (
        _renamed(tracks[0], names),
        stream(shape[1], (node, 1)),
        *(names[piece] for piece in convolved),
    )


@rule("linear")
def _linear(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    if shape is None:
        return None
    tracks = analysis.of(operand_of(node))[:-1]
    names = _patches(analysis, node, tracks)
    return (
        *(_renamed(track, names) for track in tracks),
        stream(shape[-1], (node, len(shape) - 1)),
    )


@rule("matmul", "mm", "bmm")
def _matmul(analysis: Provenance, node: fx.Node) -> TrackValue:
    shape = shape_of(node)
    weight = argument(node, 1, "other", node.kwargs.get("mat2"))
    if shape is None or not isinstance(weight, fx.Node) or rank_of(weight) != 2:
        return None
    return _linear(analysis, node)


def _patches(analysis: Provenance, node: fx.Node, tokens: Sequence[Track]) -> Names:
    """The axes of an input that was cut into patches, if this projects what is inside them.

    Height and width are cut: their slow digits are still dimensions of the tokens, their fast
    digits are not, so they are among the channels. A frames axis may be whole.
    """
    latents, grid = _pieces(tokens, Kind.LATENT), _pieces(tokens, Kind.GRID)
    pieces = sorted(latents or grid, key=lambda piece: piece.axis)
    if bool(latents) == bool(grid) or not all(piece.is_outer for piece in pieces):
        return {}
    if sum(not same(piece.step, 1) for piece in pieces) < 2:
        return {}
    if grid and _are_a_grid(grid):
        first, number = 0, len(grid[0].axes.sizes)
    elif latents and _are_cut_latents(pieces):
        number = len(pieces[0].axes.sizes) - 2
        first = number - len(pieces)  # of a single frame there is no axis left to see
    else:
        return {}
    sizes: list[Any] = [1] * number
    readers: list[Reader | None] = [None] * number
    axis_of = {p: p.axis if grid else first + i for i, p in enumerate(pieces)}
    for piece, axis in axis_of.items():
        sizes[axis], readers[axis] = piece.size, piece.reader
    axes = _start_grid(analysis, node, sizes, readers)
    return {piece: axis_track(axes, axis) for piece, axis in axis_of.items()}


def _are_cut_latents(pieces: Sequence[Piece]) -> bool:
    rank = len(pieces[0].axes.sizes)
    *_, height, width = pieces
    is_cut = not same(height.step, 1) and not same(width.step, 1)
    fits = len(pieces) in ((2, 3) if rank == 5 else (2,))
    return fits and is_cut and _is_ascending(pieces) and height.axis + 1 == width.axis
