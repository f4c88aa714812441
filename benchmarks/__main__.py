"""Run benchmark suites and record the results.

python -m benchmarks [kernel sta swba vsa sla vmoba mechanisms model masks
    overhead calibration]
    [--rounds 7] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch._inductor.config

from benchmarks import calibration
from benchmarks import kernel
from benchmarks import masks
from benchmarks import mechanisms
from benchmarks import model
from benchmarks import overhead
from benchmarks import sla
from benchmarks import sta
from benchmarks import swba
from benchmarks import vmoba
from benchmarks import vsa
from benchmarks.timing import environment

SUITES = {
    "kernel": kernel.run,
    "sta": sta.run,
    "swba": swba.run,
    "vsa": vsa.run,
    "sla": sla.run,
    "vmoba": vmoba.run,
    "mechanisms": mechanisms.run,
    "model": model.run,
    "masks": masks.run,
    "overhead": overhead.run,
    "calibration": calibration.run,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line, run the suites, print and store the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds per case")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    arguments = parser.parse_args()
    # Inductor's pool of compile workers starts in the background, on the cores that are measured.
    torch._inductor.config.compile_threads = 1
    record: dict[str, Any] = {"environment": environment(), "suites": {}}
    for name in arguments.suites or SUITES:
        record["suites"][name] = SUITES[name](arguments.rounds)
        for result in record["suites"][name]:
            print(f"{name}: {result['case']}")
            print(_indented(result), flush=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {arguments.output}")


def _indented(result: dict[str, Any]) -> str:
    lines = []
    for key, value in result.items():
        if key == "case":
            continue
        text = _numbers(value) if isinstance(value, dict) else _number(value)
        lines.append(f"    {key}: {text}")
    return "\n".join(lines)


def _numbers(values: dict[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        text = f"({_numbers(value)})" if isinstance(value, dict) else _number(value)
        parts.append(f"{name} {text}")
    return ", ".join(parts)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
