"""Several processes of one `torch.distributed` run over gloo, for tests."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# A server that has imported what takes seconds forks each process in no time.
_PRELOADED = ["torch._dynamo", "torch._inductor.compile_fx", "torch.distributed", "processes"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one process ended.

    Args:
        rank: Which it was.
        value: What its function returned.
        error: The traceback, where it raised.
        exit_code: Of the process; negative for a signal, None where it had to be killed.
        seconds: From the start of all to its end.
    """

    rank: int
    value: Any = None
    error: str = ""
    exit_code: int | None = 0
    seconds: float = 0.0


def run_processes(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    limit_s: float = 400.0,
    collective_s: float = 200.0,
    environments: dict[int, dict[str, str]] | None = None,
) -> list[Outcome]:
    """Run a function in several processes with a process group, and wait for all.

    Args:
        world_size: How many.
        function: At the top of a module; called with the arguments in each process.
        arguments: What with; pickled.
        limit_s: After it, processes that still run are killed.
        collective_s: Timeout of the process group.
        environments: Variables to set in some of the processes, by rank.

    Returns:
        How each ended, in the order of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = time.monotonic()
        ends: list[Connection] = []
        processes: list[Any] = []
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            environment = (environments or {}).get(rank, {})
            setting = (store, rank, world_size, collective_s, environment)
            process = _CONTEXT.Process(target=_run, args=(theirs, setting, function, arguments))
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        received = _receive(ends, started, limit_s)
        return [
            _outcome(rank, processes[rank], *received.get(rank, (None, 0.0)), started)
            for rank in range(world_size)
        ]


def values(world_size: int, function: Callable[..., Any], *arguments: Any, **limits: Any) -> Any:
    """Run a function in several processes and return what each returned; all must succeed."""
    outcomes = run_processes(world_size, function, *arguments, **limits)
    failed = [each for each in outcomes if each.error or each.exit_code != 0]
    assert not failed, "\n".join(f"rank {o.rank}, exit {o.exit_code}: {o.error}" for o in failed)
    return [each.value for each in outcomes]


def _receive(
    ends: list[Connection], started: float, limit_s: float
) -> dict[int, tuple[bytes | None, float]]:
    """Read what the processes send, until all have or the time is over."""
    waiting = {id(end): (rank, end) for rank, end in enumerate(ends)}
    received: dict[int, tuple[bytes | None, float]] = {}
    while waiting:
        left = limit_s - (time.monotonic() - started)
        ready = wait([end for _, end in waiting.values()], timeout=max(left, 0.0))
        if not ready:
            break
        for end in ready:
            assert isinstance(end, Connection)
            rank, _ = waiting.pop(id(end))
            try:
                message: bytes | None = end.recv_bytes()
            except EOFError:
                message = None
            received[rank] = message, time.monotonic() - started
    return received


def _outcome(
    rank: int, process: Any, message: bytes | None, seconds: float, started: float
) -> Outcome:
    import torch

    process.join(timeout=20.0 if seconds else 0.0)
    exit_code = process.exitcode
    if exit_code is None:
        process.kill()
        process.join()
    seconds = seconds or time.monotonic() - started
    value, error = (None, "") if message is None else torch.load(io.BytesIO(message))
    return Outcome(rank=rank, value=value, error=error, exit_code=exit_code, seconds=seconds)


def _run(
    end: Connection,
    setting: tuple[str, int, int, float, dict[str, str]],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    from torch import distributed

    store, rank, world_size, collective_s, environment = setting
    os.environ.update(environment)
    torch.set_num_threads(1)
    result: tuple[Any, str]
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_s),
        )
        result = function(*arguments), ""
    except BaseException:  # noqa: BLE001 - whatever it is, the test is told
        result = None, traceback.format_exc()
    buffer = io.BytesIO()
    torch.save(result, buffer)
    end.send_bytes(buffer.getvalue())
    end.close()
    if result[1]:
        os._exit(1)  # the others may wait in a collective that this one will never join
    distributed.destroy_process_group()
