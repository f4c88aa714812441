"""The command line of the audit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.audit.bounds import SHARED_BYTES
from benchmarks.audit.cases import all_cases
from benchmarks.audit.cases import quick_cases
from benchmarks.audit.chunk_cases import chunk_cases
from benchmarks.audit.chunk_cases import quick_chunk_cases
from benchmarks.audit.fingerprint import fingerprint
from benchmarks.audit.report import audit

COLUMNS = (
    *("chip", "kernel", "case", "dtype", "head_dim", "queries", "keys", "warps", "stages"),
    *("registers", "spilled", "shared", "matrix", "matrix_kind", "async_copies", "bulk_loads"),
)


def main() -> int:
    """Audit, print one line per kernel, write the record; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument("--chips", nargs="*", choices=[*SHARED_BYTES, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="the most used variants only")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON record to write")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    print("\t".join(COLUMNS))
    for chip in arguments.chips or SHARED_BYTES:
        cases = [*quick_cases(), *quick_chunk_cases()]
        if not arguments.quick:
            cases = [*all_cases(), *chunk_cases()]
        for record in audit(chip, [case for case in cases if arguments.only in case.name]):
            records.append(record)
            line = [str(record.get(column, "")) for column in COLUMNS]
            print("\t".join([*line, "; ".join(record["violations"])]), flush=True)
    if arguments.output:
        is_whole = not (arguments.quick or arguments.only)
        arguments.output.write_text(document(records, is_whole=is_whole))
    return int(any(record["violations"] for record in records))


def document(records: list[dict[str, Any]], *, is_whole: bool) -> str:
    """Return one record per line, so that a difference between two documents is readable.

    Args:
        records: What was found, of any number of chips.
        is_whole: Whether they are of all variants, so that nothing has to be compiled again.
    """
    versions = f'"triton": "{triton.__version__}", "torch": "{torch.__version__}"'
    chips = dict.fromkeys(record["chip"] for record in records if is_whole)
    sources = f'"fingerprints": {json.dumps(dict.fromkeys(chips, fingerprint()))}'
    lines = ",\n".join(map(json.dumps, records))
    return f'{{{versions}, {sources}, "kernels": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    sys.exit(main())
