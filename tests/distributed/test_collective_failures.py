"""Ranks that die or stall in the middle of a collective, and what the others make of it."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from process_groups import as_seen_here
from processes import run_processes
from processes import values
from torch import distributed

from compiled_sparse.distributed.failures import explain_collective_failure
from compiled_sparse.sharding import SequenceGroup


def _killed_in_an_exchange(killed: int) -> tuple[str, str, bool]:
    mine = torch.zeros(3 * 2**22)
    if distributed.get_rank() == killed:
        distributed.all_to_all_single(torch.empty_like(mine), mine, async_op=True)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as found:
        distributed.all_to_all_single(torch.empty_like(mine), mine)
    error = explain_collective_failure(found.value, as_seen_here())
    assert error is not None
    return error.problem, error.got, "start all ranks again" in error.next_step


def test_a_rank_killed_in_an_exchange_is_told_by_the_others() -> None:
    *others, dead = run_processes(3, _killed_in_an_exchange, 2, collective_s=10.0)
    assert dead.exit_code == -signal.SIGKILL
    for rank, each in enumerate(others):
        assert not each.error, each.error
        problem, got, says_next = each.value
        assert problem.startswith("another rank of the group ")
        assert got.startswith(f"on rank {rank} of 3: ")
        assert says_next


def _late_in_an_exchange() -> str:
    mine = torch.zeros(2)
    distributed.barrier()
    if distributed.get_rank() == 1:
        time.sleep(1.5)
        return ""
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), distributed.group.WORLD)
    with pytest.raises(RuntimeError) as found:
        distributed.all_to_all_single(torch.empty_like(mine), mine)
    error = explain_collective_failure(found.value, as_seen_here())
    assert error is not None
    return error.problem


def test_a_rank_that_is_late_in_an_exchange_is_told_by_the_others() -> None:
    late, _ = values(2, _late_in_an_exchange)
    assert late == "another rank of the group did not answer in time in the middle of a call"


NCCL = {
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely. NCCL error in: work.cpp, remote process exited or there was a network error": (
        "is gone"
    ),
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error. It can be also caused by unexpected exit of a remote peer": "is gone",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLTOALL)": (
        "did not answer in time"
    ),
    "NCCL communicator was aborted on rank 1.": "is gone",
}


@pytest.mark.parametrize(("text", "means"), NCCL.items(), ids=range(len(NCCL)))
def test_what_nccl_says_of_a_peer_is_recognised(text: str, means: str) -> None:
    outer = RuntimeError("the compiled graph failed")
    outer.__cause__ = distributed.DistBackendError(text)
    found = explain_collective_failure(outer, SequenceGroup("0", 4, 1))
    assert found is not None
    assert means in found.problem
    assert text[:60] in found.got


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer"),  # not what a collective raises
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        distributed.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert explain_collective_failure(error, SequenceGroup("0", 4, 1)) is None
