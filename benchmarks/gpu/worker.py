"""Runs cases of one section in this process and says of each what became of it.

`python -m benchmarks.gpu.worker SECTION SETTINGS EVENTS` reads the cases' names, a JSON list, from
its standard input, and writes one JSON object per line to the file EVENTS: `{"started": name}`
before a case, its result after it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import correctness
from benchmarks.gpu import model
from benchmarks.gpu import operators
from benchmarks.gpu import speed
from benchmarks.gpu.record import FAILED
from benchmarks.gpu.record import NOT_RUN
from benchmarks.gpu.record import OUT_OF_TIME
from benchmarks.gpu.record import PASSED
from benchmarks.gpu.record import SKIPPED
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.settings import SkippedError

SECTIONS: dict[str, Callable[[Settings], dict[str, CaseFunction]]] = {
    "correctness": correctness.cases,
    "operators": operators.cases,
    "model": model.cases,
    "speed": speed.cases,
}
"""The parts of a run, in order; each gives its cases by name."""

BROKEN_CONTEXT = 3
"""Exit status of a worker whose GPU context is lost: the cases that are left need another one."""

_LAST_LINES = 12


def run_cases(
    section: str, names: Iterable[str], settings: Settings, emit: Callable[[dict[str, Any]], None]
) -> bool:
    """Run cases one after the other.

    Args:
        section: Which section they are of.
        names: Which cases.
        settings: Device, size and deadline.
        emit: Called with `{"started": name}` before each case and with its result after it.

    Returns:
        False if the GPU context was lost on the way.
    """
    functions = SECTIONS[section](settings)
    for name in names:
        if time.time() > settings.deadline:
            emit({"case": name, "status": NOT_RUN, "message": OUT_OF_TIME})
            continue
        emit({"started": name})
        start = time.perf_counter()
        result, is_lost = _run(functions[name], settings)
        emit({"case": name, "seconds": round(time.perf_counter() - start, 2), **result})
        if is_lost:
            return False
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    return True


def _run(function: CaseFunction, settings: Settings) -> tuple[dict[str, Any], bool]:
    """Run a case; whatever it raises is its result. Also whether the context is lost."""
    try:
        details = function()
        if settings.device == "cuda":
            torch.cuda.synchronize()
    except SkippedError as error:
        return {"status": SKIPPED, "message": str(error)}, False
    except AssertionError as error:
        return {"status": FAILED, "message": str(error) or traceback.format_exc()}, False
    except Exception as error:  # noqa: BLE001 - the run goes on past any failure of a case
        lines = traceback.format_exc().strip().splitlines()[-_LAST_LINES:]
        is_lost = isinstance(error, torch.AcceleratorError)
        return {"status": FAILED, "message": "\n".join(lines)}, is_lost
    return {"status": PASSED, **details}, False


def main() -> int:
    """Run the cases named on the standard input."""
    section, settings, events = sys.argv[1:]
    with Path(events).open("a") as file:

        def emit(event: dict[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        names = json.load(sys.stdin)
        is_whole = run_cases(section, names, Settings.from_json(settings), emit)
    return 0 if is_whole else BROKEN_CONTEXT


if __name__ == "__main__":
    sys.exit(main())
