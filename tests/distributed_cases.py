"""The wording of the errors of `compiled_sparse.distributed`; see `test_messages.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import ring_error_cases
import sharding_error_cases
from messages import Case
from process_groups import lone_group
from torch import distributed

from compiled_sparse.distributed.agreement import abandon
from compiled_sparse.distributed.agreement import agree
from compiled_sparse.distributed.cost_inputs import Cluster
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import DistributedError
from compiled_sparse.sharding import SequenceGroup

MODULES = (
    *("distributed/agreement", "distributed/cost_inputs", "distributed/meeting"),
    *ring_error_cases.MODULES,
    *sharding_error_cases.MODULES,
)

WHAT = "the first call"
LITTLE = timedelta(seconds=0.02)


def among(size: int, call: Callable[[list[SequenceGroup]], object]) -> Callable[[], object]:
    """Run with the ranks of a group that is there for the time of the call."""

    def provoke() -> object:
        with lone_group(size) as ranks:
            return call(ranks)

    return provoke


def meet_a_failed_one(ranks: list[SequenceGroup]) -> None:
    abandon(ranks[1], WHAT, ValueError("no kernel for this head size"))
    agree(ranks[0], WHAT, {})


def come_too_late(ranks: list[SequenceGroup]) -> None:
    with suppress(DistributedError):
        agree(ranks[0], WHAT, {}, timeout=LITTLE)
    agree(ranks[1], WHAT, {}, timeout=LITTLE)


def disagree(ranks: list[SequenceGroup]) -> None:
    def other() -> None:
        with suppress(DistributedError):
            agree(ranks[1], WHAT, {"policy": "vsa"})

    thread = threading.Thread(target=other)
    thread.start()
    try:
        agree(ranks[0], WHAT, {"policy": "sta"})
    finally:
        thread.join()


def lose_the_store() -> None:
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = distributed.TCPStore("127.0.0.1", server.port, is_master=False)
    with lone_group(2, client) as ranks:
        del server
        agree(ranks[0], WHAT, {}, timeout=LITTLE)


def meet_without_a_store() -> None:
    storeless = distributed.ProcessGroup(0, 1)
    distributed.distributed_c10d._register_process_group("storeless", storeless)
    try:
        agree(SequenceGroup("storeless", 1, 0), WHAT, {})
    finally:
        distributed.distributed_c10d._unregister_process_group("storeless")


CASES = {
    **ring_error_cases.CASES,
    **sharding_error_cases.CASES,
    "handshake with a rank that failed": Case(
        DistributedError,
        "rank 1 (global 1) failed before the first call",
        "ValueError: no kernel for this head size",
        "all 2 ranks of the group",
        "correct what failed on that rank",
        among(2, meet_a_failed_one),
    ),
    "handshake without some ranks": Case(
        DistributedError,
        "ranks 1 (global 1), 2 (global 2) did not come to the first call",
        "2 of 3 ranks missing when rank 0 (global 0) gave up after",
        "make the same calls in the same order",
        "wrote last: ended, or elsewhere in the program",
        among(3, lambda ranks: agree(ranks[0], WHAT, {}, timeout=LITTLE)),
    ),
    "handshake too late": Case(
        DistributedError,
        "this rank came too late to the first call",
        "rank 1 (global 1) came when rank 0 (global 0) gave up after",
        "all ranks come in that time",
        "raise COMPILED_SPARSE_HANDSHAKE_TIMEOUT",
        among(2, come_too_late),
    ),
    "handshake of different calls": Case(
        DistributedError,
        "the ranks disagree about the first call",
        "policy: 'sta' on this rank, 'vsa' on rank 1 (global 1)",
        "the same on every rank",
        "the same code, model, policy, video and schedule",
        among(2, disagree),
    ),
    "timeout of a handshake": Case(
        DistributedError,
        "timeout is no time to wait",
        "'-1.0'",
        "a number of seconds above 0",
        "leave it out for 1800 seconds",
        among(2, lambda ranks: agree(ranks[0], WHAT, {}, timeout=timedelta(seconds=-1))),
    ),
    "handshake without a store that answers": Case(
        DistributedError,
        "the store of the process group does not answer",
        "Error: ",
        "rank 0 or the launcher, is alive",
        "then start all ranks again",
        lose_the_store,
    ),
    "handshake without a store": Case(
        DistributedError,
        "no store for its ranks to meet in",
        "group 'storeless'",
        "init_process_group, new_group or init_device_mesh",
        "make the group by one of these",
        meet_without_a_store,
    ),
    "handshake without a group": Case(
        DistributedError,
        "no process group of this name",
        "'nowhere'",
        "that this process belongs to",
        "torch.distributed.init_process_group first",
        lambda: agree(SequenceGroup("nowhere", 2, 0), WHAT, {}),
    ),
    "GPUs of a cluster": Case(
        ConfigError,
        "these GPUs are not whole nodes",
        "12 GPUs, 8 per node",
        "or a multiple of that",
        "round gpus",
        lambda: Cluster(gpus=12),
    ),
}
