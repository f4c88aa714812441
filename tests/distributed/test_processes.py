"""The processes that the tests of this folder run in."""

from __future__ import annotations

import os
import signal

import torch
from processes import run_processes
from processes import values
from torch import distributed


def _gathered(offset: int) -> list[int]:
    mine = torch.tensor([distributed.get_rank() + offset])
    found = [torch.zeros_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, mine)
    return [int(each) for each in found]


def test_processes_talk_to_each_other_and_return_what_they_found() -> None:
    assert values(3, _gathered, 5) == [[5, 6, 7]] * 3


def _failing_on_one() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("no such thing")


def test_an_exception_is_of_its_process() -> None:
    good, bad = run_processes(2, _failing_on_one)
    assert (good.error, good.exit_code) == ("", 0)
    assert "ValueError: no such thing" in bad.error
    assert bad.exit_code == 1


def _killed_on_one() -> None:
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_has_no_value() -> None:
    _, bad = run_processes(2, _killed_on_one)
    assert (bad.value, bad.error, bad.exit_code) == (None, "", -signal.SIGKILL)
