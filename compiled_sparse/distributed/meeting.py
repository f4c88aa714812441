"""Where the processes of a group meet: a few keys in the group's store, and never its device.

The store is the key-value service that torch.distributed starts up with. Unlike a collective it
needs no device, and a process that never comes cannot block a stream.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import distributed

from compiled_sparse.errors import DistributedError
from compiled_sparse.sharding import SequenceGroup

_PREFIX = "compiled_sparse/meeting"
_PAUSES_S = (0.001, 0.1)
_LINGER_S = 0.3
_COMPLETE = "complete"

_lock = Lock()
# By rank too, so that threads of one process can be ranks. A group that is made again under an
# old name is another object and counts from 0, as it does in a process that was started again.
_counts: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a meeting ended: the same for every rank, whichever of them decided it.

    Args:
        ended_by: The rank that ended it early; None where all ranks came.
        missing: Ranks that had not come when it was given up.
        waited_s: How long the one that gave up had waited, in seconds.
        failure: What that rank failed with instead of coming.
    """

    ended_by: int | None = None
    missing: tuple[int, ...] = ()
    waited_s: float = 0.0
    failure: str = ""


class Meeting:
    """One meeting of all ranks of a group, each with something to say.

    The ranks' n-th meetings are the same one. What ends it is written once, under one key, by an
    operation of the store that only the first caller succeeds in; so no rank takes for complete
    what another has given up.

    Args:
        group: The group.

    Raises:
        DistributedError: if this process has no such group, or the group no store.
    """

    def __init__(self, group: SequenceGroup) -> None:
        self._group = group
        process_group = process_group_of(group.name)
        self._store = _store(process_group, group.name)
        self._global_ranks = distributed.get_process_group_ranks(process_group)
        with _lock:
            counts = _counts.setdefault(process_group, {})
            number = counts[group.rank] = counts.get(group.rank, -1) + 1
        prefix = f"{_PREFIX}/{number}"
        self._facts = [f"{prefix}/rank/{rank}" for rank in range(group.size)]
        self._arrived, self._left = f"{prefix}/arrived", f"{prefix}/left"
        self._outcome = f"{prefix}/outcome"

    def describe_ranks(self, *ranks: int) -> str:
        """Return ranks of the group in words, with their numbers in the whole run."""
        names = [f"{each} (global {self._global_ranks[each]})" for each in ranks]
        return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)

    def arrive(self, facts: Mapping[str, str]) -> None:
        """Say what this rank has to say; the last one to come completes the meeting."""
        with self._answering():
            self._store.set(self._facts[self._group.rank], json.dumps(dict(facts)))
            if self._store.add(self._arrived, 1) == self._group.size:
                self._store.compare_set(self._outcome, "", _COMPLETE)

    def fail(self, failure: str) -> None:
        """End the meeting, as this rank will never come."""
        self._end(Outcome(ended_by=self._group.rank, failure=failure))
        self.linger()

    def linger(self) -> None:
        """Let the others read how it ended, before an error ends this process.

        It may be the one that serves the store. Each of them asks more often than this.
        """
        time.sleep(_LINGER_S)

    def wait(
        self, seconds: float, *, patience_s: float, on_patience: Callable[[], None]
    ) -> Outcome:
        """Wait until the meeting is over, and end it where that takes too long.

        Args:
            seconds: Longest time.
            patience_s: Time after which to call `on_patience`, once.
            on_patience: Such as a warning.
        """
        started = time.monotonic()
        pause, longest_pause = _PAUSES_S
        # Asked for again and again, as a store that waits on the server's side blocks every other
        # thread that uses the same connection.
        while not self._has(self._outcome):
            waited = time.monotonic() - started
            if waited >= seconds:
                missing, rank = self.missing(), self._group.rank
                self._end(Outcome(ended_by=rank, missing=missing, waited_s=waited))
                break
            if waited >= patience_s:
                on_patience()
                patience_s = float("inf")
            time.sleep(min(pause, seconds - waited))
            pause = min(1.5 * pause, longest_pause)
        with self._answering():
            outcome = _decoded(self._store.get(self._outcome))
        if outcome.ended_by is not None:
            self.linger()
        return outcome

    def missing(self) -> tuple[int, ...]:
        """Return the ranks that have not come yet."""
        return tuple(rank for rank, key in enumerate(self._facts) if not self._has(key))

    def read(self) -> list[dict[str, str]]:
        """Return what each rank said at a complete meeting, and leave it.

        The last one to leave clears the store.
        """
        with self._answering():
            said = [json.loads(each) for each in self._store.multi_get(self._facts)]
            if self._store.add(self._left, 1) == self._group.size:
                for key in (*self._facts, self._arrived, self._left, self._outcome):
                    self._store.delete_key(key)
        return said

    def _has(self, key: str) -> bool:
        with self._answering():
            return bool(self._store.check([key]))

    def _end(self, outcome: Outcome) -> None:
        with self._answering():
            self._store.compare_set(self._outcome, "", json.dumps(vars(outcome)))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(
                "the store of the process group does not answer",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                expected="the process that serves it, rank 0 or the launcher, is alive",
                next_step="look at what that process wrote last, then start all ranks again",
            ) from error


def _decoded(value: bytes) -> Outcome:
    text = value.decode()
    if text == _COMPLETE:
        return Outcome()
    fields = json.loads(text)
    return Outcome(**{**fields, "missing": tuple(fields["missing"])})


def process_group_of(name: str) -> Any:
    """Return the process group of a name: torch has no public function for that.

    Args:
        name: As functional collectives take it.

    Raises:
        DistributedError: if this process has no such group.
    """
    try:
        from torch._C._distributed_c10d import _resolve_process_group

        return _resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]
    except (ImportError, RuntimeError) as error:
        raise DistributedError(
            "this process has no process group of this name",
            got=repr(name),
            expected="a group of torch.distributed that this process belongs to",
            next_step="call torch.distributed.init_process_group first, and destroy it last",
        ) from error


def _store(process_group: Any, name: str) -> Any:
    store = process_group.get_group_store()
    if store is None:
        raise DistributedError(
            "the process group has no store for its ranks to meet in",
            got=f"group {name!r} of backend {process_group.name()!r}",
            expected="a group made by init_process_group, new_group or init_device_mesh",
            next_step="make the group by one of these",
        )
    return store
