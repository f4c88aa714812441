"""`compiled-sparse doctor`: the environment, to paste into a bug, and whether results are right."""

from __future__ import annotations

import argparse
import json
from typing import Any

from compiled_sparse.cli import diagnosis
from compiled_sparse.cli import machine
from compiled_sparse.cli.arguments import Commands

DOCTOR_VERSION = 1
CHECK_FAILED = 1


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="report the environment, check results against the reference",
        description="Report versions, devices, kernels and settings, and check small results "
        "against the dense reference. Exit status 1 if one is wrong. The home directory is "
        "written as ~; of environment variables only this package's values are shown.",
        epilog="examples:\n  compiled-sparse doctor\n  compiled-sparse doctor --json > doctor.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look at everything and print it.

    Returns:
        0 if every check passed, else 1.
    """
    found = diagnosis.checks()
    passed = all(check.passed for check in found)
    sections: dict[str, Any] = {
        "versions": machine.versions(),
        "extras": machine.extras(),
        "system": machine.system(),
        "devices": machine.devices(),
        "cpu_kernel": diagnosis.cpu_kernel(),
        "gpu_kernel": diagnosis.gpu_kernel(),
        "compiler": diagnosis.compiler(),
        "environment": machine.environment(),
    }
    document = {"version": DOCTOR_VERSION, "passed": passed, **sections}
    document["checks"] = diagnosis.as_dicts(found)
    document = machine.without_home(document)
    print(json.dumps(document, indent=2) if arguments.json else _text(document, list(sections)))
    return 0 if passed else CHECK_FAILED


def _text(document: dict[str, Any], sections: list[str]) -> str:
    lines = []
    for title in sections:
        lines += [title.replace("_", " "), *_lines(document[title]), ""]
    lines.append("checks")
    for check in document["checks"]:
        verdict = "passed" if check["passed"] else "FAILED"
        lines += _lines({check["name"]: f"{verdict}: {check['detail']}"})
    return "\n".join(lines)


def _lines(section: dict[str, Any]) -> list[str]:
    """One line for each value, those of several lines indented further."""
    width = max(map(len, section), default=0)
    rows = [f"  {name:<{width}}  {value}" for name, value in section.items()] or ["  none set"]
    return [row.replace("\n", "\n      ") for row in rows]
