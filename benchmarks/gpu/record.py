"""The JSON record: complete on the disk after every case, and a table of it in plain text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

FORMAT = 1
PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"
OUT_OF_TIME = "not run: out of time"
SPEED = "speed"


class Record:
    """Results of one run, kept on the disk.

    Args:
        path: The JSON file; written anew after every change, by renaming, so that it is whole
            whenever the process is killed.
        environment: Machine and versions.
        settings: What was asked for.
    """

    def __init__(self, path: Path, environment: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "status": "running",
            "environment": environment,
            "settings": settings,
            "failures": [],
            "sections": {},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, section: str, result: dict[str, Any]) -> None:
        """Add the result of a case and write the file."""
        cases = self.data["sections"].setdefault(section, {"cases": []})["cases"]
        cases.append(result)
        if result["status"] == FAILED:
            failure = {"section": section, "case": result["case"], "message": result["message"]}
            self.data["failures"].append(failure)
        self.write()

    def finish(self, seconds: float) -> int:
        """Set the final status, write the file, and return the exit status.

        Returns:
            0 if every check ran and passed, 1 if something failed, 2 if nothing failed but time
            ended before some check ran. Benchmarks that were not run count for neither.
        """
        unchecked = [
            case
            for name, section in self.data["sections"].items()
            for case in section["cases"]
            if name != SPEED and case["status"] == NOT_RUN
        ]
        code = 1 if self.data["failures"] else 2 if unchecked else 0
        self.data["status"] = (PASSED, FAILED, "incomplete")[code]
        self.data["seconds"] = round(seconds, 1)
        self.write()
        return code

    def write(self) -> None:
        """Write the file."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        draft.replace(self.path)


def summary(data: dict[str, Any]) -> str:
    """Return counts per section, failures, and the table of benchmarks, as plain text."""
    lines = []
    for name, section in data["sections"].items():
        counts = Counter(case["status"] for case in section["cases"])
        lines.append(f"{name}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    for failure in data["failures"]:
        first = failure["message"].strip().splitlines() or [""]
        lines.append(f"FAILED {failure['section']}: {failure['case']}: {first[-1]}")
    cases = data["sections"].get(SPEED, {"cases": []})["cases"]
    measured = [case for case in cases if case.get("milliseconds")]
    if measured:
        lines += ["", *_table([_HEADER, *map(_row, measured)])]
    lines += [
        f"  moving tokens, ms, {case['case']}: {_numbers(case['moving_tokens'])}"
        for case in measured
        if case.get("moving_tokens")
    ]
    return "\n".join(lines)


_HEADER = ("case", "dense", "flex", "sparse", "limit ms", "TFLOP/s", "MFU", "x dense", "x flex")


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    times = case["milliseconds"]
    over_flex = None
    if times.get("flex_attention") and times.get("compiled_sparse"):
        over_flex = times["flex_attention"] / times["compiled_sparse"]
    return (
        case["case"],
        f"{_number(times.get('dense'))} {case.get('dense_backend') or ''}".strip(),
        _number(times.get("flex_attention")),
        _number(times.get("compiled_sparse")),
        _number(case["bound"]["milliseconds"]),
        _number(case["tflops"].get("compiled_sparse")),
        _number(case["mfu"].get("compiled_sparse")),
        _number(case["speed_up_over_dense"].get("compiled_sparse")),
        _number(over_flex),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
