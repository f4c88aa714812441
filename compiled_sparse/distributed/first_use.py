"""A compiled call of several processes: they agree before its first run, and errors are explained.

The agreement is per compiled variant, so that a steady run pays for it once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compiled_sparse.distributed.agreement import abandon
from compiled_sparse.distributed.agreement import agree
from compiled_sparse.distributed.failures import explain_collective_failure
from compiled_sparse.sharding import SequenceGroup

WHAT = "the first run of a compiled graph"


@dataclass(frozen=True)
class Joint:
    """What the processes of one group must have in common to run a graph.

    Args:
        group: The processes.
        facts: By name.
    """

    group: SequenceGroup
    facts: Mapping[str, str]


def together(compiled: Callable[..., Any], joints: Sequence[Joint]) -> Callable[..., Any]:
    """Let a compiled callable agree with the other processes before its first run.

    Args:
        compiled: The callable.
        joints: What they must agree on; nothing is done where there is none.

    Returns:
        A callable that raises `DistributedError` where processes disagree or one is gone.
    """
    return _Together(compiled, joints) if joints else compiled


@contextmanager
def abandoning(groups: Sequence[SequenceGroup]) -> Iterator[None]:
    """Tell the other processes if what is inside the block fails, as they wait for this one.

    Args:
        groups: The groups that would have agreed next; read when it fails.
    """
    try:
        yield
    except Exception as error:
        for group in groups:
            abandon(group, WHAT, error)
        raise


class _Together:
    def __init__(self, compiled: Callable[..., Any], joints: Sequence[Joint]) -> None:
        self._compiled = compiled
        self._joints = joints
        self._lock = threading.Lock()
        self._has_agreed = False

    def __call__(self, *inputs: Any) -> Any:
        if not self._has_agreed:
            self._agree()
        try:
            return self._compiled(*inputs)
        except RuntimeError as error:
            for joint in self._joints:
                explained = explain_collective_failure(error, joint.group)
                if explained is not None:
                    raise explained from error
            raise

    def _agree(self) -> None:
        with self._lock:
            if self._has_agreed:
                return
            for joint in self._joints:
                agree(joint.group, WHAT, joint.facts)
            self._has_agreed = True
