"""From a site's tracks, or the caller's word, to a layout: proven or refused."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compiled_sparse.layout import Text
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.tracks import StreamPart
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import VideoPart
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.passes.tracks import shares_provenance


@dataclass(frozen=True)
class SiteLayout:
    """Where the video tokens of a site are.

    Args:
        grid: Tokens per axis, integers or SymInts.
        text_before: Tokens in front of the video.
        text_after: Tokens behind it.
        origin: "metadata" or "graph".
        source: The patch embedding, where the graph proved the layout.
    """

    grid: tuple[Any, ...]
    text_before: Any = 0
    text_after: Any = 0
    origin: str = "graph"
    source: fx.Node | None = None

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
    if site.lost_at is not None:
        return Refusal("layout_unknown", f"tensor written in place by {site.lost_at.name!r}")
    tracks = (site.query_track, site.key_track, site.value_track)
    length = site.tensor("query").shape[-2]
    if not site.is_self_length:
        return Refusal("cross_attention", "queries and keys differ in length")
    if site.graph_has_video and site.query_from_video != site.key_from_video:
        return Refusal("cross_attention", "keys are not the queries' tokens")
    if site.graph_has_video and not site.query_from_video:
        return Refusal("not_video", "its tokens do not come from the patch embedding")
    if not shares_provenance(*tracks):
        return Refusal(
            "layout_unknown", "queries, keys and values are not provably the same tokens"
        )
    if given is not None and bool(length == given.num_tokens):
        text = given.text or Text()
        return SiteLayout(given.grid_thw, text.before, text.after, origin="metadata")
    if has_video(site.query_track):
        return _layout_of_track(site.query_track)
    if site.graph_has_video:
        return Refusal("layout_unknown", "its tokens are not in the patch embedding's order")
    return Refusal("layout_unknown", _advice(length, given))


def _advice(length: Any, given: LayoutMetadata | None) -> str:
    if given is None:
        return "the graph does not show the grid; pass cs.metadata(grid_thw=(T, H, W))"
    return (
        f"cs.metadata describes {given.num_tokens} tokens, this call has {hint(length)}; "
        "count grid_thw after patching and text= in tokens"
    )


def _layout_of_track(track: Track) -> SiteLayout | Refusal:
    videos = [i for i, part in enumerate(track) if isinstance(part, VideoPart)]
    part = track[videos[0]]
    assert isinstance(part, VideoPart)
    if len(videos) > 1:
        return Refusal("several_grids", "more than one video in the sequence")
    if not part.is_whole_grid:
        axes = "".join("THW"[axis] for axis in part.axes)
        return Refusal("partial_grid", f"attends along {axes} only")
    before = _text_length(track[: videos[0]])
    after = _text_length(track[videos[0] + 1 :])
    return SiteLayout(part.grid, before, after, source=part.source)


def _text_length(parts: tuple[Any, ...]) -> Any:
    return sum(part.size for part in parts if isinstance(part, StreamPart))


def is_static(layout: SiteLayout) -> bool:
    """Whether every number of a layout is a plain integer."""
    numbers = (*layout.grid, layout.text_before, layout.text_after)
    return all(isinstance(number, int) for number in numbers)


def can_be_dynamic(site: Site, layout: SiteLayout) -> bool:
    """Whether a symbolic layout can be written into the site's graph.

    The grid is read off the patch embedding, which must be in the same graph; of the two text
    lengths one may vary, as the rest of the sequence.
    """
    varying = [t for t in (layout.text_before, layout.text_after) if not isinstance(t, int)]
    is_here = layout.source is not None and layout.source.graph is site.node.graph
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
        axis if isinstance(axis, int) else _size_node(layout.source, 2 + i)
        for i, axis in enumerate(layout.grid)
    ]
    before, after = layout.text_before, layout.text_after
    if isinstance(before, int) and isinstance(after, int):
        return grid, before, after
    rest = _size_node(site.arguments["query"], 2)
    fixed = before if isinstance(before, int) else after
    for amount in (functools.reduce(_times, grid), fixed):
        rest = _call(operator.sub, rest, amount)
    return (grid, before, rest) if isinstance(before, int) else (grid, rest, after)


def _size_node(tensor: Any, dim: int) -> fx.Node:
    return _call(torch.ops.aten.sym_size.int, tensor, dim)


def _times(left: Any, right: Any) -> Any:
    nodes = isinstance(left, fx.Node) or isinstance(right, fx.Node)
    return _call(operator.mul, left, right) if nodes else left * right


def _call(function: Any, *arguments: Any) -> fx.Node:
    graph = next(argument.graph for argument in arguments if isinstance(argument, fx.Node))
    node = graph.call_function(function, arguments)
    values = [example_value(a) if isinstance(a, fx.Node) else a for a in arguments]
    node.meta["example_value"] = function(*values)
    return node
