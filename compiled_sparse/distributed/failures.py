"""Errors of collectives that say that another process is gone."""

from __future__ import annotations

import re
import textwrap

from compiled_sparse.errors import DistributedError
from compiled_sparse.sharding import SequenceGroup

_GONE = re.compile(
    r"connection closed by peer|connection reset|connection refused|broken pipe"
    r"|remote process exited|unexpected exit of a remote peer|ncclRemoteError"
    r"|communicator (?:was|has been) aborted|NCCL communicator .*\babort",
    re.IGNORECASE,
)
_LATE = re.compile(
    r"timed out waiting|application timeout caused pair closure|collective operation timeout"
    r"|watchdog caught collective|collective timeout|(?:connection|operation) timed out",
    re.IGNORECASE,
)
_LONGEST = 400


def explain_collective_failure(
    error: BaseException, group: SequenceGroup
) -> DistributedError | None:
    """Say what an error of a collective means, where it means that another rank is gone.

    gloo and NCCL report a dead or late peer as the state of a socket. Raise the result from the
    error, so that both are seen.

    Args:
        error: As it was caught; what it was raised from counts too.
        group: The ranks of the collective.

    Returns:
        The error to raise, or None where this one has another reason.
    """
    at_hand: BaseException | None = error
    while isinstance(at_hand, Exception):
        # c10d has classes of its own only for some of these, and all are RuntimeError.
        text = str(at_hand) if isinstance(at_hand, RuntimeError) else ""
        if _LATE.search(text):
            return _explained("did not answer in time", text, group)
        if _GONE.search(text):
            return _explained("is gone", text, group)
        at_hand = at_hand.__cause__
    return None


def _explained(problem: str, text: str, group: SequenceGroup) -> DistributedError:
    return DistributedError(
        f"another rank of the group {problem} in the middle of a call",
        got=f"on rank {group.rank} of {group.size}: {textwrap.shorten(text, _LONGEST)}",
        expected=f"all {group.size} ranks stay until the call ends",
        next_step="look for the rank whose log ends first or holds another error, such as one out "
        "of memory; then start all ranks again, as this process group cannot be used any more",
    )
