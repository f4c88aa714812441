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

from benchmarks.gpu import chunk_speed
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


def _speed(settings: Settings) -> dict[str, CaseFunction]:
    return speed.cases(settings) | chunk_speed.cases(settings)


SECTIONS: dict[str, Callable[[Settings], dict[str, CaseFunction]]] = {
    "correctness": correctness.cases,
    "operators": operators.cases,
    "model": model.cases,
    "speed": _speed,
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
    _compute_in_float32()
    functions = SECTIONS[section](settings)
    for name in names:
        if time.time() > settings.deadline:
            emit({"case": name, "status": NOT_RUN, "message": OUT_OF_TIME})
            continue
        emit({"started": name})
        start = time.perf_counter()
        result = _run(functions[name], settings.device)
        emit({"case": name, "seconds": round(time.perf_counter() - start, 2), **result})
        gc.collect()
        if settings.device == "cuda" and not _context_is_whole():
            return False
    return True


def _context_is_whole() -> bool:
    """Free the memory of the last case; False if an error of it sticks to the context."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _compute_in_float32() -> None:
    """Products of float32 are those of float32: what is plain must not be less exact."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _run(function: CaseFunction, device: str) -> dict[str, Any]:
    """Run a case; whatever it raises is its result."""
    try:
        details = function()
        if device == "cuda":
            torch.cuda.synchronize()
    except SkippedError as error:
        return {"status": SKIPPED, "message": str(error)}
    except Exception:  # noqa: BLE001 - the run goes on past any failure of a case
        lines = traceback.format_exc().strip().splitlines()[-_LAST_LINES:]
        return {"status": FAILED, "message": "\n".join(lines)}
    return {"status": PASSED, **details}


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
