"""Sequences that are as long as the named grid but are not all the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.passes.tracks import has_video
from compiled_sparse.registry import Refused

Outcome = SiteLayout | Refusal | Refused

_REFUSAL = Refusal(
    "layout_unknown",
    "several sequences have as many tokens as the grid; "
    "pass text= to name those with that much text",
)


def refuse_lookalikes(sites: Sequence[Site], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Refuse all layouts that rest on a length alone where unlike sequences have that length.

    A prompt with as many tokens as the image attends to itself just as the image does: which of the
    two a grid was named for cannot be told.

    Args:
        sites: The calls of one graph.
        outcomes: The layout or refusal of each.

    Returns:
        The outcomes after.
    """
    runs = [_run_by_length(outcome) for outcome in outcomes]
    by_root: dict[fx.GraphModule, list[Track]] = {}
    for site, run in zip(sites, runs, strict=True):
        if run:
            by_root.setdefault(site.root, []).append(run)
    unlike = {root for root, group in by_root.items() if not _are_alike(group)}
    return [
        _REFUSAL if run and site.root in unlike else outcome
        for site, run, outcome in zip(sites, runs, outcomes, strict=True)
    ]


def _are_alike(runs: list[Track]) -> bool:
    """Whether all are one sequence, to which something may have been added later.

    What is left of a video whose tokens were lost on the way is the caller's word.
    """
    videos = {run for run in runs if has_video(run)}
    names = [_origins(run) for run in runs if not has_video(run)]
    fewest = min(names, key=len, default=frozenset())
    return len(videos) <= 1 and all(fewest <= each for each in names)


def _run_by_length(outcome: Outcome) -> Track:
    return outcome.by_length if isinstance(outcome, SiteLayout) else ()


def _origins(track: Track) -> frozenset[object]:
    streams = [atom for atom in atoms_of(track) if isinstance(atom, Stream)]
    return frozenset().union(*(each.origins for each in streams))
