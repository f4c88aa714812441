"""Audit one chip: every case compiled, read and held against the bounds."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.audit.bounds import violations
from benchmarks.audit.cases import Case
from benchmarks.audit.cases import launch_helpers
from benchmarks.audit.cases import launches
from benchmarks.audit.chunk_cases import ChunkCase
from benchmarks.audit.chunk_cases import chunk_launches
from benchmarks.audit.chunk_cases import selection_launches
from benchmarks.audit.machine_code import usage
from benchmarks.audit.offline import Compiled
from benchmarks.audit.offline import compiling_for
from benchmarks.audit.switches import switches


def audit(chip: str, cases: Iterable[Case | ChunkCase]) -> Iterator[dict[str, Any]]:
    """Yield one record for each kernel of each case.

    A kernel that several cases compile alike (those for lists) is reported once.
    """
    seen: set[str] = set()
    for case in cases:
        if case.precision == "tf32" and not chip.startswith("sm_"):
            continue
        with compiling_for(chip) as compiled, switches(case.precision, case.boxes):
            _launch(case)
        for kernel in compiled:
            record = _record(chip, case, kernel)
            if "error" in record or record["hash"] not in seen:
                seen.add(record.pop("hash", ""))
                yield record


def _launch(case: Case | ChunkCase) -> None:
    if isinstance(case, ChunkCase):
        for launch in (*chunk_launches(case), *selection_launches(case)):
            launch()
        return
    for launch in launches(case):
        launch()
    launch_helpers(case)


def _record(chip: str, case: Case | ChunkCase, kernel: Compiled) -> dict[str, Any]:
    record = {
        "chip": chip,
        "kernel": kernel.kernel,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "head_dim": case.head_dim,
        "queries": kernel.constants.get("BLOCK_M"),
        "keys": kernel.constants.get("BLOCK_N"),
        "warps": kernel.warps,
        "stages": kernel.stages,
    }
    if kernel.error is not None:
        return record | {"error": kernel.error, "violations": [kernel.error]}
    used = usage(kernel.result)
    wrong = violations(
        kernel.kernel,
        chip,
        used,
        warps=kernel.warps,
        matrix=_has_matrix_instructions(case),
        wide_rows=_own_rows(kernel) >= 64,
    )
    return record | used.as_dict() | {"violations": list(wrong), "hash": kernel.result.hash}


def _has_matrix_instructions(case: Case | ChunkCase) -> bool:
    return (
        case.quantized
        or case.dtype.itemsize == 2
        or (case.dtype == torch.float32 and case.precision == "tf32")
    )


def _own_rows(kernel: Compiled) -> int:
    side = "BLOCK_N" if kernel.kernel.endswith("backward_keys") else "BLOCK_M"
    return int(kernel.constants.get(side, 0))
