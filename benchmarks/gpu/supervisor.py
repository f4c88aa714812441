"""Runs sections in processes of their own, so that a crash costs one case and no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import FAILED
from benchmarks.gpu.record import NOT_RUN
from benchmarks.gpu.record import OUT_OF_TIME
from benchmarks.gpu.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
CASE_SECONDS = 150.0
"""After this time a case counts as hanging, the first one of a process included."""

_POLL_SECONDS = 0.05
_LOG_CHARACTERS = 1500

OnResult = Callable[[str, dict[str, Any]], None]
Command = Callable[[str, Settings, Path], list[str]]


@dataclass
class Job:
    """Cases of one section for one process.

    Args:
        section: Which section.
        names: Cases that are still to be run.
    """

    section: str
    names: list[str]


def worker_command(section: str, settings: Settings, events: Path) -> list[str]:
    """Return the command line of a worker."""
    module = "benchmarks.gpu.worker"
    return [sys.executable, "-m", module, section, settings.to_json(), str(events)]


@dataclass
class _Worker:
    """A process that works on a job."""

    job: Job
    process: subprocess.Popen[bytes]
    events: Path
    log: Path
    running: str | None = None
    since: float = field(default_factory=time.time)
    read: int = 0

    def results(self) -> list[dict[str, Any]]:
        """Return the results that came in since the last call, and keep track of the rest."""
        lines = self.events.read_text().split("\n")[:-1]
        new, self.read = lines[self.read :], len(lines)
        results = []
        for event in map(json.loads, new):
            self.since = time.time()
            self.running = event.get("started")
            if self.running is None:
                self.job.names.remove(event["case"])
                results.append(event)
        return results

    def kill(self) -> None:
        """End the process and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def lost_cases(self, reason: str) -> list[dict[str, Any]]:
        """Give up the case at work, or all if none could be begun; returns their results."""
        lost = [self.running] if self.running else [] if self.read else list(self.job.names)
        self.job.names = [name for name in self.job.names if name not in lost]
        end = self.log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip()
        message = f"{end}\n{reason}".strip()
        return [{"case": name, "status": FAILED, "message": message} for name in lost]


def supervise(
    jobs: Sequence[Job],
    settings: Settings,
    on_result: OnResult,
    *,
    parallel: int,
    command: Command = worker_command,
    case_seconds: float = CASE_SECONDS,
) -> None:
    """Run jobs, each in a process, until they are done or the deadline has passed.

    A process that dies or hangs loses the case it was at, and another one takes over the rest.

    Args:
        jobs: What to run; begun in this order.
        settings: Device, size and deadline.
        on_result: Called with the section and the result of every case.
        parallel: How many processes at a time.
        command: Command line of a worker.
        case_seconds: How long one case may take.
    """
    waiting, workers = list(jobs), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or workers) and time.time() < settings.deadline:
                while waiting and len(workers) < parallel:
                    workers.append(_start(waiting.pop(0), settings, Path(folder), command))
                time.sleep(_POLL_SECONDS)
                for worker in list(workers):
                    if _watch(worker, on_result, case_seconds):
                        workers.remove(worker)
                        if worker.job.names:
                            waiting.insert(0, worker.job)
        finally:
            for worker in workers:
                worker.kill()
        for worker in workers:
            for result in worker.results():
                on_result(worker.job.section, result)
    for job in [*(worker.job for worker in workers), *waiting]:
        for name in job.names:
            result = {"case": name, "status": NOT_RUN, "message": OUT_OF_TIME}
            on_result(job.section, result)


def _start(job: Job, settings: Settings, folder: Path, command: Command) -> _Worker:
    events, log = (
        Path(tempfile.mkstemp(dir=folder, suffix=suffix)[1]) for suffix in (".events", ".log")
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(job.section, settings, events),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(job.names).encode())
    process.stdin.close()
    return _Worker(job, process, events, log)


def _watch(worker: _Worker, on_result: OnResult, case_seconds: float) -> bool:
    """Pass on what a worker has done; returns whether it is gone."""
    status = worker.process.poll()
    for result in worker.results():
        on_result(worker.job.section, result)
    if status is None and time.time() - worker.since < case_seconds:
        return False
    worker.kill()
    reason = f"the process died with status {status}"
    if status is None:
        reason = f"stopped after {case_seconds:.0f} s without an end"
    for result in worker.lost_cases(reason):
        on_result(worker.job.section, result)
    return True
