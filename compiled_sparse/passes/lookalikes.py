"""Sequences that are as long as the named grid but are not all the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import atoms_of
from compiled_sparse.registry import Refused

Outcome = SiteLayout | Refusal | Refused


def refuse_lookalikes(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Refuse all layouts that rest on a length alone where unlike sequences have that length.

    A prompt with as many tokens as the image attends to itself just as the image does: which of the
    two a grid was named for cannot be told.

    Args:
        outcomes: The layouts and refusals of one graph's calls.

    Returns:
        The outcomes after.
    """
    runs = [_origins(run) for run in map(_run_by_length, outcomes) if run]
    if not runs or all(min(runs, key=len) <= run for run in runs):
        return list(outcomes)
    refusal = Refusal(
        "layout_unknown",
        "several sequences have as many tokens as the grid; "
        "pass text= to name those with that much text",
    )
    return [refusal if _run_by_length(outcome) else outcome for outcome in outcomes]


def _run_by_length(outcome: Outcome) -> Track:
    return outcome.by_length if isinstance(outcome, SiteLayout) else ()


def _origins(track: Track) -> frozenset[object]:
    streams = [atom for atom in atoms_of(track) if isinstance(atom, Stream)]
    return frozenset().union(*(each.origins for each in streams))
