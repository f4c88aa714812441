"""From a site's tracks, or the caller's word, to a layout: proven or refused."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compiled_sparse.layout import sequence_grid
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.combining import same_raster
from compiled_sparse.passes.combining import shares_provenance
from compiled_sparse.passes.fx import call
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.rearranged import is_rearranged
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Piece
from compiled_sparse.passes.tracks import Reader
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import named_atoms
from compiled_sparse.passes.tracks import track_size
from compiled_sparse.passes.ulysses_paths import gathers_from_ranks

MAX_AXES = 3


@dataclass(frozen=True)
class SiteLayout:
    """Where the video tokens of a site are.

    Args:
        grid: Tokens per axis, integers or SymInts.
        text_before: Tokens in front of the video.
        text_after: Tokens behind it.
        origin: "metadata" or "graph".
        readers: Where the length of each axis can be read, where the graph proved the layout.
        by_length: The tokens that were taken for the video because there are as many as the caller
            said; empty where a table of positions was there to go by, or the caller named the text.
    """

    grid: tuple[Any, ...]
    text_before: Any = 0
    text_after: Any = 0
    origin: str = "graph"
    readers: tuple[Reader | None, ...] = ()
    by_length: Track = ()

    @property
    def grid_hint(self) -> tuple[int, ...]:
        """The grid as integers, symbolic axes by their example."""
        return tuple(hint(axis) for axis in self.grid)


@dataclass(frozen=True)
class Refusal:
    """Why a site cannot take a sparse mechanism.

    Args:
        reason: Stable code, see `compiled_sparse.reasons`.
        detail: What was seen, and what to pass to change it.
    """

    reason: str
    detail: str


def find_layout(site: Site, given: LayoutMetadata | None) -> SiteLayout | Refusal:
    """Prove that a site is self-attention over video and say on which grid.

    Args:
        site: The call.
        given: What `cs.metadata` says; it outranks the graph where its length fits.

    Returns:
        The layout, or the refusal.
    """
    refusal = refuse_other_tokens(site)
    if refusal is not None:
        return refusal
    layout = _given_layout(site, given) or _layout_of_graph(site)
    if layout is not None:
        return layout
    if site.graph_has_video:
        return Refusal("layout_unknown", "its tokens are not in the patch embedding's order")
    return Refusal("layout_unknown", _advice(site, given))


def as_sequence(
    site: Site, layout: SiteLayout | Refusal, *, is_attached: bool
) -> SiteLayout | Refusal:
    """Lay a site out as one axis: for a mechanism that needs no grid, only the tokens' order.

    The order is that in which the model hands the tokens in. That queries, keys and values are the
    same tokens must be proven as always; without a grid, so must be that they are the video's.

    Args:
        site: The call.
        layout: What `find_layout` says of it.
        is_attached: Whether the module that makes the call was attached: it is then the caller's
            word that its tokens are the video's.

    Returns:
        The layout of one axis without text, or the refusal as it was.
    """
    length = site.tensor("query").shape[-2]
    readers = (Reader(site.arguments["query"], 2),)
    if isinstance(layout, SiteLayout):
        numbers = (layout.grid, layout.text_before, layout.text_after)
        grid = sequence_grid(*numbers) if is_static(layout) else (length,)
        return SiteLayout(grid, origin=layout.origin, readers=readers)
    if layout.reason not in ("layout_unknown", "several_grids") or refuse_other_tokens(site):
        return layout
    if _holds_whole_videos(site):
        return SiteLayout((length,), readers=readers)
    if is_attached and not site.graph_has_video and _is_unsplit(site.query_track):
        return SiteLayout((length,), origin="attach", readers=readers)
    return layout


def _holds_whole_videos(site: Site) -> bool:
    """Whether every video of the sequence is there with all its tokens, in whatever order."""
    videos = [part for part in site.query_track if part.is_video]
    is_spread = any(isinstance(atom, Piece) for atom in atoms_of(site.batch_track))
    return bool(videos) and not is_spread and all(map(_is_whole_video, videos))


def _is_whole_video(part: Part) -> bool:
    axes = part.pieces[0].axes
    is_of_one = len(part.pieces) == len(part.atoms) and {p.axes for p in part.pieces} == {axes}
    return part.cut is None and is_of_one and same(part.size, math.prod(axes.sizes))


def _is_unsplit(track: Track) -> bool:
    """Whether a dimension was never taken apart: else the rest of its tokens may be elsewhere."""
    origins = (o for atom in atoms_of(track) if isinstance(atom, Stream) for o in atom.origins)
    return not any(map(named_atoms, origins)) and all(part.cut is None for part in track)


def refuse_other_tokens(site: Site) -> Refusal | None:
    """Refuse what is not provably the self-attention of the video's tokens, or of unknown ones.

    Args:
        site: The call.

    Returns:
        The refusal, or None.
    """
    if site.lost_at is not None:
        return Refusal("layout_unknown", f"tensor written in place by {site.lost_at.name!r}")
    if not site.is_self_length and gathers_from_ranks(site.arguments["key"]):
        return Refusal("keys_gathered", "keys of other processes with queries of this one")
    if not site.is_self_length:
        return Refusal("cross_attention", "queries and keys differ in length")
    if site.graph_has_video and site.query_from_video != site.key_from_video:
        return Refusal("cross_attention", "keys are not the queries' tokens")
    if site.graph_has_video and not site.query_from_video and not _is_placed(site):
        return Refusal("not_video", "its tokens do not come from the patch embedding")
    if not shares_provenance(site.query_track, site.key_track, site.value_track):
        return Refusal(
            "layout_unknown", "queries, keys and values are not provably the same tokens"
        )
    if not site.has_one_batch:
        return Refusal(
            "layout_unknown", "queries, keys and values may be of different members of the batch"
        )
    return None


def _advice(site: Site, given: LayoutMetadata | None) -> str:
    if given is None:
        return (
            "the graph does not show the grid; pass cs.metadata(grid_thw=(T, H, W)) "
            "or call cs.attach(model)"
        )
    length = hint(site.tensor("query").shape[-2])
    problem = f"cs.metadata describes {given.num_tokens} tokens, this call has {length}"
    if given.text is None and length > given.num_tokens:
        return f"{problem} and the graph does not show which of them are video; pass text="
    return f"{problem}; count grid_thw after patching and text= in tokens"


def _given_layout(site: Site, given: LayoutMetadata | None) -> SiteLayout | None:
    """What the caller said, where its length fits; text nobody mentioned is read off the graph."""
    length = site.tensor("query").shape[-2]
    if given is None or hint(length) < given.num_tokens:
        return None
    if given.text is None:
        return _by_length(site.query_track, given)
    text = given.text
    if not bool(length == given.num_video_tokens + text.before + text.after):
        return None
    return SiteLayout(given.grid_thw, text.before, text.after, origin="metadata")


def _by_length(track: Track, given: LayoutMetadata) -> SiteLayout | None:
    """Take the one run of parts that has the video's length, if there is one; the rest is text."""
    runs = [
        (first, last)
        for first in range(len(track))
        for last in range(first + 1, len(track) + 1)
        if hint(track_size(track[first:last])) == given.num_video_tokens
    ]
    if has_video(track):
        runs = [run for run in runs if has_video(track[slice(*run)])]
    if len(runs) != 1:
        return None
    ((first, last),) = runs
    run, text = track[first:last], (track[:first], track[last:])
    if is_rearranged(run) or not bool(track_size(run) == given.num_video_tokens):
        return None
    before, after = (int(track_size(part)) for part in text)
    unproven = () if any(map(_positions, run)) else run
    return SiteLayout(given.grid_thw, before, after, origin="metadata", by_length=unproven)


def _layout_of_graph(site: Site) -> SiteLayout | Refusal | None:
    if has_video(site.query_track):
        return _layout_of_track(site.query_track, site.batch_track)
    return _layout_of_positions(site) if _is_placed(site) else None


def _is_placed(site: Site) -> bool:
    """Whether any queries or keys were rotated by a table of positions."""
    return any(map(_positions, (*site.query_track, *site.key_track)))


def _layout_of_track(track: Track, batch: Track) -> SiteLayout | Refusal:
    videos = [i for i, part in enumerate(track) if part.is_video]
    if any(track[i].cut is not None for i in videos):
        return Refusal("layout_unknown", "some of the video's tokens are missing or moved")
    if len(videos) > 1:
        return Refusal("several_grids", "more than one video in the sequence")
    part = track[videos[0]]
    axes = [piece.axis for piece in part.pieces]
    known = part.pieces[0].axes
    in_order = (
        len(part.pieces) == len(part.atoms)
        and all(piece.is_whole and piece.axes == known for piece in part.pieces)
        and axes == sorted(axes)
    )
    if not in_order or len(known.live) < 2:
        return Refusal("layout_unknown", "its tokens are not in the patch embedding's order")
    if tuple(axes) != known.live or any(isinstance(atom, Piece) for atom in atoms_of(batch)):
        names = "THW"[-len(known.sizes) :]
        along = "".join(names[axis] for axis in axes)
        return Refusal("partial_grid", f"attends along {along} only")
    return _with_text(track, videos[0], known.sizes, known.readers)


def _with_text(
    track: Track, index: int, grid: tuple[Any, ...], readers: tuple[Reader | None, ...]
) -> SiteLayout:
    before, after = track_size(track[:index]), track_size(track[index + 1 :])
    return SiteLayout(grid, before, after, readers=readers)


def _positions(part: Part) -> frozenset[tuple[Piece, ...]]:
    """Tables of positions the tokens of a part were rotated by."""
    (atom, *rest) = part.atoms
    is_whole = isinstance(atom, Stream) and not rest and part.cut is None
    return atom.positions if is_whole and isinstance(atom, Stream) else frozenset()


def _layout_of_positions(site: Site) -> SiteLayout | Refusal | None:
    """Tokens packed elsewhere: queries and keys are rotated by one table of one grid."""
    placed = [i for i, part in enumerate(site.query_track) if _positions(part)]
    if len(placed) > 1:
        return Refusal("several_grids", "more than one table of positions in the sequence")
    if not placed or placed != [i for i, part in enumerate(site.key_track) if _positions(part)]:
        return None
    rasters = [
        raster
        for track in (site.query_track, site.key_track)
        for raster in _positions(track[placed[0]])
    ]
    if not all(same_raster(rasters[0], raster) for raster in rasters):
        return Refusal("layout_unknown", "its tokens have positions on more than one grid")
    grid = _grid_of_table(rasters[0])
    return None if grid is None else _with_text(site.query_track, placed[0], *grid)


def _grid_of_table(
    raster: tuple[Piece, ...],
) -> tuple[tuple[Any, ...], tuple[Reader | None, ...]] | None:
    """The grid a table runs over: all axes of one meshgrid, or one each of several tables."""
    if not all(piece.is_whole for piece in raster) or len(raster) > MAX_AXES:
        return None
    axes = dict.fromkeys(piece.axes for piece in raster)
    first = raster[0].axes
    if len(axes) == 1 and tuple(piece.axis for piece in raster) == first.live:
        return (first.sizes, first.readers) if len(first.sizes) <= MAX_AXES else None
    if len(axes) < len(raster) or any(len(each.sizes) > 1 for each in axes):
        return None
    return tuple(piece.size for piece in raster), tuple(piece.reader for piece in raster)


def is_static(layout: SiteLayout) -> bool:
    """Whether every number of a layout is a plain integer."""
    numbers = (*layout.grid, layout.text_before, layout.text_after)
    return all(isinstance(number, int) for number in numbers)


def can_be_dynamic(site: Site, layout: SiteLayout) -> bool:
    """Whether a symbolic layout can be written into the site's graph.

    The grid is read off the tensors that prove it, which must be in the same graph; of the two text
    lengths one may vary, as the rest of the sequence.
    """
    varying = [t for t in (layout.text_before, layout.text_after) if not isinstance(t, int)]
    readers = layout.readers or (None,) * len(layout.grid)
    is_here = all(
        isinstance(axis, int) or (reader is not None and reader.node.graph is site.node.graph)
        for axis, reader in zip(layout.grid, readers, strict=True)
    )
    return is_here and len(varying) <= 1


def specialized(layout: SiteLayout) -> SiteLayout:
    """Fix a symbolic grid to its present value; the compiled graph is then guarded on it."""
    return replace(layout, grid=tuple(int(axis) for axis in layout.grid))


def layout_arguments(site: Site, layout: SiteLayout) -> tuple[list[Any], Any, Any]:
    """Write a layout as graph arguments in front of a site: integers, or nodes where symbolic.

    Args:
        site: The call; the graph's insertion point must be before it.
        layout: A layout for which `is_static` or `can_be_dynamic` holds.

    Returns:
        Grid, text tokens before, text tokens after.
    """
    grid = [
        axis if isinstance(axis, int) else _length_node(layout.readers[i])
        for i, axis in enumerate(layout.grid)
    ]
    before, after = layout.text_before, layout.text_after
    if isinstance(before, int) and isinstance(after, int):
        return grid, before, after
    rest = _size_node(site.arguments["query"], 2)
    fixed = before if isinstance(before, int) else after
    for amount in (functools.reduce(_times, grid), fixed):
        rest = call(operator.sub, rest, amount)
    return (grid, before, rest) if isinstance(before, int) else (grid, rest, after)


def _length_node(reader: Reader | None) -> fx.Node:
    assert reader is not None
    return _size_node(*reader)


def _size_node(tensor: Any, dim: int) -> fx.Node:
    return call(torch.ops.aten.sym_size.int, tensor, dim)


def _times(left: Any, right: Any) -> Any:
    nodes = isinstance(left, fx.Node) or isinstance(right, fx.Node)
    return call(operator.mul, left, right) if nodes else left * right
