"""Compiles every builder of tests/models and writes what became of it to docs/models.md.

    python tools/model_table.py [--json] [--output FILE] [NAME ...]

Models run in a process beside this one, which is started again if a model ends it. The exit status
is 1 if an output differed, a layout was wrong, a graph break was added or a model did not run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "models.md"
TESTS = (ROOT / "tests" / "models", ROOT / "tests")

Row = dict[str, Any]


def builders() -> dict[str, Any]:
    """Return the builders of tests/models by name."""
    sys.path[:0] = [str(folder) for folder in TESTS]
    found: dict[str, Any] = importlib.import_module("builders").BUILDERS
    return found


def work(names: list[str]) -> None:
    """Measure models and print one line of JSON for each; what the process beside does."""
    known = builders()
    measure = importlib.import_module("measure").measure
    for name in names:
        try:
            row = measure(known[name]).to_dict()
        except Exception as error:  # noqa: BLE001 - one model must not end the table
            row = _failed(known[name], f"{type(error).__name__}: {error}")
        print(json.dumps(row), flush=True)


def _failed(builder: Any, problem: str) -> Row:
    return {
        "name": builder.name,
        "family": builder.family,
        "model": builder.model,
        "grid": list(builder.grid),
        "ways": [],
        "is_right": False,
        "problem": problem.splitlines()[0],
    }


def rows(names: list[str]) -> Iterator[Row]:
    """Yield the row of each model, whatever one of them does to its process."""
    known, left = builders(), list(names)
    while left:
        command = [sys.executable, str(Path(__file__)), "--worker", *left]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "5"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("{"):
                    left.pop(0)
                    yield json.loads(line)
        if left:
            yield _failed(known[left.pop(0)], f"the process ended with {worker.returncode}")


TITLE = """# Models

What becomes of the attention calls of every video and image transformer in diffusers
{diffusers}, with small random configurations on the CPU (torch {torch}). `{command}`
writes this file, and fails if anything in it is wrong.

- **calls**: executions of `scaled_dot_product_attention` in one forward. **sparse**: those that
  ran our operation, with nothing but `torch.compile(model, backend="compiled_sparse")` or with
  what the line names.
- **left**: calls over the whole grid that stayed dense, the reason in a note. Other dense calls
  are not meant to become sparse: attention to text, of text, within a frame, along time.
- **graphs**: without us and with us; more than one means graph breaks that the model brings.
  Dynamo's capture flags are `torch._dynamo.config.capture_scalar_outputs` and
  `capture_dynamic_output_shape_ops`, which avoid some of them.
- **exact**: largest difference between a window over the whole grid and dense attention,
  relative to the largest output.
- **narrow**: the same between the narrowest window (one tile of {tile}) and the eager
  model whose calls are replaced by the masked reference, at the layout in the report. That
  layout must also be the one that was read off the model's code.
"""

HEAD = (
    "| model | class | calls | sparse | left | graphs | exact | narrow | note |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
)

_PLAIN_ERROR = 1e-5
_AMPLIFIED = (
    "The model rounds to few digits inside: errors of one rounding in its attention outputs move "
    "the result as far as this."
)


def markdown(table: list[Row], command: str) -> str:
    """Render all rows, grouped by family, with notes below."""
    notes: list[str] = []
    lines = [TITLE.format(**_versions(), command=command, tile="2x3x2 or 2x3 tokens"), HEAD]
    for row in sorted(table, key=lambda row: (row["family"].lower(), row["name"])):
        lines += _lines(row, notes)
    sparse = sum(any(way["sparse"] for way in row["ways"]) for row in table)
    complete = sum(any(not way["missed"] for way in row["ways"]) for row in table)
    lines.append(
        f"\n{len(table)} configurations; {sparse} have sparse calls, {complete} have no call left, "
        f"{sum(row['is_right'] for row in table)} are right.\n\n## Notes\n"
    )
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    lines += ["\n## Not in the table\n", *_out_of_scope()]
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name).partition("+")[0] for name in ("diffusers", "torch")}


def _lines(row: Row, notes: list[str]) -> list[str]:
    if "problem" in row:
        note = _note(notes, f"Did not run: {row['problem']}")
        return [f"| {row['name']} | `{row['model']}` | | | | | | | {note} |"]
    return [_line(row, way, notes) for way in row["ways"]]


def _line(row: Row, way: Row, notes: list[str]) -> str:
    remarks = [*way["wrong"], *(way["details"] if way["missed"] else ())]
    if max(way["exact_error"], way["narrow_error"]) > _PLAIN_ERROR:
        remarks.append(_AMPLIFIED)
    marks = [_note(notes, remark) for remark in remarks]
    name = f"... with {_code(way['way'])}" if way["way"] else row["name"]
    cells = (
        name,
        "" if way["way"] else f"`{row['model']}`",
        way["calls"],
        way["sparse"],
        way["missed"],
        f"{way['dense_graphs']}/{way['graphs']}",
        _error(way["exact_error"]),
        _error(way["narrow_error"]),
        ", ".join(dict.fromkeys(marks)),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _code(way: str) -> str:
    return " and ".join(f"`{w}`" if "(" in w else w for w in way.split(" and "))


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _note(notes: list[str], text: str) -> str:
    reason, separator, detail = text.partition(": ")
    text = f"`{reason}`: {detail}" if separator and "_" in reason else text
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def _out_of_scope() -> list[str]:
    listed: dict[str, str] = importlib.import_module("builders.scope").OUT_OF_SCOPE
    reasons = dict.fromkeys(listed.values())
    names = {why: [f"`{name}`" for name in listed if listed[name] == why] for why in reasons}
    return [f"- {why}: {', '.join(names[why])}" for why in reasons]


def _progress(row: Row, started: float, done: str) -> None:
    ways = [f"{way['sparse']}/{way['calls']} left {way['missed']}" for way in row["ways"]]
    state = "ok" if row["is_right"] else "WRONG " + str(row.get("problem", row["ways"]))
    seconds = f"{time.monotonic() - started:5.0f}s"
    print(f"{seconds} {done} {row['name']}: {'; '.join(ways)} {state}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure the models, write or print the table, return the exit status."""
    parser = argparse.ArgumentParser(description="Writes docs/models.md, or prints it as JSON.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all without one")
    parser.add_argument("--json", action="store_true", help="print JSON, write nothing")
    parser.add_argument("--output", type=Path, help="default docs/models.md if all models run")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.names)
        return 0
    known = builders()
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"unknown model {', '.join(unknown)}; known are {', '.join(known)}")
    names, started, table = options.names or list(known), time.monotonic(), []
    for row in rows(names):
        table.append(row)
        _progress(row, started, f"{len(table)}/{len(names)}")
    output = options.output or (None if options.names else OUTPUT)
    if options.json:
        print(json.dumps(table, indent=2))
    elif output is None:
        print(markdown(table, "python tools/model_table.py"))
    else:
        output.write_text(markdown(table, "python tools/model_table.py"), encoding="utf-8")
    return 0 if all(row["is_right"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
