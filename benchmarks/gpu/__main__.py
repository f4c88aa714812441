"""Check the GPU path and measure it; one JSON record and a table.

python -m benchmarks.gpu [--output FOLDER] [--minutes 9] [--sections correctness ...] [--only TEXT]

Exit status 0 if every check passed, 1 if one failed, 2 if none failed but time ended before some
ran. Benchmarks that time left no room for are in the record as not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.environment import environment
from benchmarks.gpu.record import NOT_RUN
from benchmarks.gpu.record import SPEED
from benchmarks.gpu.record import Record
from benchmarks.gpu.record import summary
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.supervisor import Job
from benchmarks.gpu.supervisor import supervise
from benchmarks.gpu.worker import SECTIONS
from benchmarks.gpu.worker import run_cases

RESULTS = Path(__file__).parents[1] / "results"
SHARE_OF_CHECKS = 0.55
"""Checks may take this part of the time; benchmarks get what is left."""

CHECKING_PROCESSES = 10
"""Processes that check at the same time; benchmarks run alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few cases")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--in-process", action="store_true", help="for a debugger: no processes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available; --device cpu --quick tests the harness itself")
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    start = time.time()
    record = Record(_path(options), environment(options.device), _asked(options))
    print(_facts(record.data["environment"]), flush=True)
    seconds = 60 * options.minutes
    settings = Settings(options.device, options.quick, start + seconds)
    names = {
        section: [name for name in SECTIONS[section](settings) if options.only in name]
        for section in options.sections
    }

    def on_result(section: str, result: dict[str, Any]) -> None:
        record.add(section, result)
        print(_line(section, result), flush=True)

    checks = [section for section in options.sections if section != SPEED]
    if SPEED in options.sections and checks:
        until = start + SHARE_OF_CHECKS * seconds
        _sections(options, checks, names, dataclasses.replace(settings, deadline=until), on_result)
        checks = []
    _sections(options, checks or [SPEED], names, settings, on_result)
    code = record.finish(time.time() - start)
    print("", summary(record.data), "", f"{record.data['status']}: {record.path}", sep="\n")
    return code


def _sections(
    options: argparse.Namespace,
    sections: Sequence[str],
    names: dict[str, list[str]],
    settings: Settings,
    on_result: Any,
) -> None:
    """Run sections; several checks at a time where there are the cores for it."""
    if options.in_process:
        for section in sections:

            def emit(event: dict[str, Any], section: str = section) -> None:
                if "started" not in event:
                    on_result(section, event)

            run_cases(section, names[section], settings, emit)
        return
    cores = os.cpu_count() or 1
    parallel = 1 if options.device == "cpu" else max(1, min(CHECKING_PROCESSES, cores * 2 // 3))
    jobs = []
    for section in sections:
        shards = max(1, parallel - 2) if section == "correctness" else 1
        parts = [names[section][i::shards] for i in range(shards)]
        jobs += [Job(section, part) for part in parts if part]
    supervise(jobs, settings, on_result, parallel=parallel)


def _path(options: argparse.Namespace) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Path(options.output) / f"gpu_check_{options.device}_{stamp}.json"


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("device", "quick", "minutes", "sections", "only", "in_process")
    }


def _facts(facts: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _line(section: str, result: dict[str, Any]) -> str:
    if result["status"] == NOT_RUN:
        return f"{section}: {result['case']}: {result['message']}"
    parts = [f"{section}: {result['case']}: {result['status']}"]
    if "seconds" in result:
        parts.append(f"({result['seconds']} s)")
    times = result.get("milliseconds")
    if times:
        parts.append(", ".join(f"{name} {value:.3f} ms" for name, value in times.items()))
    if result.get("message"):
        parts.append(result["message"].strip().splitlines()[-1])
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
