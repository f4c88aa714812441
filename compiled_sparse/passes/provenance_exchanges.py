"""What tokens are behind an exchange among processes. Importing this module registers the rules."""

from __future__ import annotations

from typing import Any

from torch import fx

from compiled_sparse.passes.combining import fused
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
        whole = _whole(rows, (size, rank), num_video, (before, after))
        heads = stream(value.shape[1], (node, index, 1))
        found.append((batch, heads, whole or stream(value.shape[2], (node, index)), channels))
    return found


def _whole(
    rows: Track, place: tuple[int, int], num_video: Any, text: tuple[Any, Any]
) -> Track | None:
    """All tokens of a sequence that each rank has a run of, if the run is that of its rank."""
    length = track_size(rows)
    end = length - text[1]
    texts = [slice_track(rows, *limits) for limits in ((0, text[0]), (end, length))]
    video = slice_track(rows, text[0], end)
    if video is None or any(
        each is None and not same(size, 0) for each, size in zip(texts, text, strict=True)
    ):
        return None
    whole = _joined_runs(video, *place, num_video)
    return None if whole is None else (*(texts[0] or ()), whole, *(texts[1] or ()))


def _joined_runs(video: Track, size: int, rank: int, num_video: Any) -> Part | None:
    (part, *more) = video
    run = track_size(video)
    is_own = part.cut == (rank * run, (rank + 1) * run)
    is_all = same(Part(part.atoms).size, num_video) and same(size * run, num_video)
    if has_video(video):
        return Part(part.atoms) if not more and is_own and is_all else None
    if part.cut is not None and is_all and not is_own:
        return None  # another rank's run: the whole is not in the order of ranks
    names = frozenset(("gathered", origin) for each in video for origin in fused(each).origins)
    return Part((Stream(names, num_video),)) if len(video) == 1 and names else None


@rule("gather_heads.default")
def _gather_heads(analysis: Provenance, node: fx.Node) -> TrackValue:
    arguments: Any = node.args
    shape = example_value(node).shape
    batch, heads, rows, _ = analysis.of(arguments[1])
    return (batch, heads, rows, stream(shape[3], (node, 3)))
