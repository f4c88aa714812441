"""A handshake before the first collective: every rank is there and means the same call.

Ranks that compiled different calls would wait for each other in a collective without an end, or
exchange tensors that mean something else. So each says what it is about to compute first.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import textwrap
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch

import compiled_sparse
from compiled_sparse.distributed.meeting import Meeting
from compiled_sparse.distributed.meeting import Outcome
from compiled_sparse.errors import DistributedError
from compiled_sparse.sharding import SequenceGroup

logger = logging.getLogger("compiled_sparse")

TIMEOUT_VARIABLE = "COMPILED_SPARSE_HANDSHAKE_TIMEOUT"
# Ranks compile before they meet, and one that finds a cold cache may take a quarter of an hour
# longer than one that does not. Ending such a run costs more than noticing a hung one late.
DEFAULT_TIMEOUT_S = 1800.0
_PATIENCE_S = 60.0

_LONGEST_PUBLISHED = 2000
_SHOWN = 160
_SHOWN_BEFORE = 40
_LONGEST_FAILURE = 500
_SOURCES = (".py", ".cpp", ".h")
_ABSENT = "(nothing)"


def agree(
    group: SequenceGroup,
    what: str,
    facts: Mapping[str, str],
    *,
    timeout: timedelta | None = None,
) -> None:
    """Wait for all ranks of the group, and make sure that they are about to do the same.

    The n-th call of a rank meets the n-th calls of the others, so every rank has to make the same
    calls in the same order; threads that would do so in any order need a group each. Nothing runs
    on a device. The versions of torch and of this package's code are compared too.

    Args:
        group: The ranks.
        what: What they agree on, in words for errors.
        facts: What must be equal, by name, such as policy, grid or local length.
        timeout: Longest wait; None for `COMPILED_SPARSE_HANDSHAKE_TIMEOUT`, or half an hour.

    Raises:
        DistributedError: on every rank, if one did not come in time, failed before, or differs in
            a fact; on this one, if the group has no store that answers or the timeout is none.
    """
    meeting = Meeting(group)
    seconds = _seconds(timeout, meeting)
    meeting.arrive(_published(what, facts))

    def warn() -> None:
        logger.warning(
            "still waiting for %s, for %s", meeting.describe_ranks(*meeting.missing()), what
        )

    outcome = meeting.wait(seconds, patience_s=_PATIENCE_S, on_patience=warn)
    if outcome.ended_by is not None:
        _raise_ended(meeting, outcome, what, group)
    _check_equal(meeting, meeting.read(), what, group.rank)


def abandon(group: SequenceGroup, what: str, error: BaseException) -> None:
    """Tell the other ranks that this one will never come to its next handshake.

    In place of `agree`, where what comes before it fails: the others raise at once, with this
    error's message. A group without a store that answers is only logged, so that the error at hand
    stays the one that is seen.

    Args:
        group: The ranks.
        what: What they would have agreed on.
        error: What went wrong here.
    """
    try:
        Meeting(group).fail(_in_short(error))
    except DistributedError as unheard:
        logger.warning("the other ranks were not told that %s failed: %s", what, unheard.problem)


def _seconds(timeout: timedelta | None, meeting: Meeting) -> float:
    """Return the longest wait; a wrong one is told to the others, who would wait for this rank."""
    if timeout is not None:
        source, text = "timeout", str(timeout.total_seconds())
    else:
        source, text = TIMEOUT_VARIABLE, os.environ.get(TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(text or DEFAULT_TIMEOUT_S)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        error = DistributedError(
            f"{source} is no time to wait",
            got=repr(text),
            expected="a number of seconds above 0",
            next_step=f"correct it, or leave it out for {DEFAULT_TIMEOUT_S:g} seconds",
        )
        meeting.fail(_in_short(error))
        raise error
    return seconds


def _in_short(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST_FAILURE)


def _published(what: str, facts: Mapping[str, str]) -> dict[str, str]:
    """Return the facts as they are compared: long ones cut, with a digest of the whole."""
    code = {"compiled_sparse": _source_digest(), "torch": torch.__version__}
    return {name: _compact(text) for name, text in {"call": what, **facts, **code}.items()}


def _compact(text: str) -> str:
    if len(text) <= _LONGEST_PUBLISHED:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[:_LONGEST_PUBLISHED]}... (sha256 {digest})"


@lru_cache(maxsize=1)
def _source_digest() -> str:
    """Return a digest of this package's code, as checkouts of one version differ."""
    folder = Path(compiled_sparse.__file__).parent
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return f"code of sha256 {digest.hexdigest()[:16]}"


def _raise_ended(meeting: Meeting, outcome: Outcome, what: str, group: SequenceGroup) -> None:
    assert outcome.ended_by is not None
    ender = meeting.describe_ranks(outcome.ended_by)
    if outcome.failure:
        raise DistributedError(
            f"{ender} failed before {what}",
            got=outcome.failure,
            expected=f"all {group.size} ranks of the group come to {what}",
            next_step="correct what failed on that rank, then start all ranks again",
        )
    waited = f"{ender} gave up after {outcome.waited_s:.1f} s"
    if group.rank in outcome.missing:
        raise DistributedError(
            f"this rank came too late to {what}",
            got=f"{meeting.describe_ranks(group.rank)} came when {waited}",
            expected="all ranks come in that time",
            next_step=f"see what this rank did before; if it compiled, raise {TIMEOUT_VARIABLE}",
        )
    absent = meeting.describe_ranks(*outcome.missing)
    raise DistributedError(
        f"{absent} did not come to {what}",
        got=f"{len(outcome.missing)} of {group.size} ranks missing when {waited}",
        expected=f"all {group.size} ranks of the group make the same calls in the same order",
        next_step=f"see what {absent} wrote last: ended, or elsewhere in the program? If still "
        f"compiling, raise {TIMEOUT_VARIABLE}",
    )


def _check_equal(meeting: Meeting, said: Sequence[Mapping[str, str]], what: str, rank: int) -> None:
    mine = said[rank]
    differences = []
    for name in dict.fromkeys(name for each in said for name in each):
        own = mine.get(name, _ABSENT)
        for other, facts in enumerate(said):
            if (theirs := facts.get(name, _ABSENT)) != own:
                here, there = _around_difference(own, theirs)
                where = meeting.describe_ranks(other)
                differences.append(f"{name}: {here} on this rank, {there} on {where}")
                break
    if differences:
        meeting.linger()
        raise DistributedError(
            f"the ranks disagree about {what}",
            got=f"{meeting.describe_ranks(rank)}: " + "; ".join(differences),
            expected="the same on every rank of the group",
            next_step="give every rank the same code, model, policy, video and schedule, and let "
            "all make the same calls in the same order",
        )


def _around_difference(one: str, other: str) -> tuple[str, str]:
    """Return the parts of two texts where they begin to differ, each in a line."""
    if max(len(one), len(other)) <= _SHOWN:
        return repr(one), repr(other)
    pairs = enumerate(zip(one, other, strict=False))
    differing = (index for index, (a, b) in pairs if a != b)
    begin = max(0, next(differing, min(len(one), len(other))) - _SHOWN_BEFORE)
    return _part(one, begin), _part(other, begin)


def _part(text: str, begin: int) -> str:
    end = begin + _SHOWN
    part = repr(text[begin:end])
    return ("..." if begin else "") + part + ("..." if len(text) > end else "")
