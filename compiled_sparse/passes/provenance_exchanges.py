"""What tokens are behind an exchange among processes. Importing this module registers the rules."""

from __future__ import annotations

from typing import Any
from typing import NamedTuple

from torch import fx

from compiled_sparse.passes.combining import fused
from compiled_sparse.passes.exchanges import GRID
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.provenance import TrackValue
from compiled_sparse.passes.provenance import rule
from compiled_sparse.passes.reshapes import slice_track
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import stream
from compiled_sparse.passes.tracks import track_size


@rule("scatter_heads.default")
def _scatter_heads(analysis: Provenance, node: fx.Node) -> TrackValue:
    arguments: Any = node.args
    tensors, _, size, rank, num_video, before, after = arguments
    if isinstance(num_video, fx.Node):
        num_video = example_value(num_video)
    found = []
    for index, (tensor, value) in enumerate(zip(tensors, example_value(node), strict=True)):
        batch, _, rows, channels = analysis.of(tensor)
        place = _Place(size, rank, num_video, node.meta.get(GRID))
        whole = _whole(rows, place, (before, after))
        heads = stream(value.shape[1], (node, index, 1))
        found.append((batch, heads, whole or stream(value.shape[2], (node, index)), channels))
    return found


class _Place(NamedTuple):
    """Whose run of which video.

    Attributes:
        size: Number of ranks.
        rank: Whose.
        num_video: Tokens of the whole video.
        grid: Its token grid, where the caller said so.
    """

    size: int
    rank: int
    num_video: Any
    grid: tuple[int, ...] | None


def _whole(rows: Track, place: _Place, text: tuple[Any, Any]) -> Track | None:
    """All tokens of a sequence that each rank has a run of, if the run is that of its rank."""
    length = track_size(rows)
    end = length - text[1]
    texts = [slice_track(rows, *limits) for limits in ((0, text[0]), (end, length))]
    video = slice_track(rows, text[0], end)
    if video is None or any(
        each is None and not same(size, 0) for each, size in zip(texts, text, strict=True)
    ):
        return None
    whole = _joined_runs(video, place)
    return None if whole is None else (*(texts[0] or ()), whole, *(texts[1] or ()))


def _joined_runs(video: Track, place: _Place) -> Part | None:
    (part, *more) = video
    size, rank, num_video, _ = place
    run = track_size(video)
    is_own = part.cut == (rank * run, (rank + 1) * run)
    is_all = same(Part(part.atoms).size, num_video) and same(size * run, num_video)
    if has_video(video) and is_own and is_all and not more:
        return Part(part.atoms)
    if has_video(video) and (more or not _is_slab(part, place)):
        return None
    if part.cut is not None and is_all and not is_own:
        return None  # another rank's run: the whole is not in the order of ranks
    names = frozenset(("gathered", origin) for each in video for origin in fused(each).origins)
    return Part((Stream(names, num_video),)) if len(video) == 1 and names else None


def _is_slab(part: Part, place: _Place) -> bool:
    """Whether a video of its own, to this graph, is one rank's frames of the video that was said.

    Cut along height or width instead, the ranks' runs would not add up to its raster order.
    """
    grid = place.grid
    if grid is None or part.cut is not None or len(part.pieces) != len(part.atoms):
        return False
    known = part.pieces[0].axes
    axes = tuple(piece.axis for piece in part.pieces)
    is_raster = axes == known.live and all(p.is_whole and p.axes == known for p in part.pieces)
    frames = (grid[0] // place.size, *grid[1:])
    return is_raster and len(known.sizes) == len(grid) and all(map(same, known.sizes, frames))


@rule("ring_whole.default")
def _ring_whole(analysis: Provenance, node: fx.Node) -> TrackValue:
    arguments: Any = node.args
    x, num_video, before, after = arguments
    ring = node.meta["compiled_sparse_ring"]
    batch, heads, rows, channels = analysis.of(x)
    place = _Place(ring.group.size, ring.group.rank, num_video, ring.grid)
    whole = _whole(rows, place, (before, after))
    return (batch, heads, whole or stream(example_value(node).shape[2], (node, 2)), channels)


@rule("gather_heads.default", "ring_own.default")
def _gather_heads(analysis: Provenance, node: fx.Node) -> TrackValue:
    arguments: Any = node.args
    shape = example_value(node).shape
    batch, heads, rows, _ = analysis.of(arguments[1])
    return (batch, heads, rows, stream(shape[3], (node, 3)))
