"""Every kernel compiled for chips that are not here, and held against the bounds of the audit.

Compiling needs a process without Triton's interpreter, so the audit runs as a program.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.audit.bounds import SHARED_BYTES
from benchmarks.audit.bounds import violations
from benchmarks.audit.fingerprint import SOURCES
from benchmarks.audit.fingerprint import fingerprint
from benchmarks.audit.machine_code import Usage

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks/results/gpu_audit.json"
OLD_TRITON = Path(sys.prefix) / "triton-3.6.0"
KERNELS = {
    *("attention_forward", "attention_backward_queries", "attention_backward_keys", "row_sums"),
    *("mark_listed", "collect_marked", "order_by_count", "block_means", "list_top_k"),
    *("quantize_queries", "quantize_keys", "round_values", "attention_forward_quantized"),
    *("chunk_attention_forward", "chunk_attention_backward_queries"),
    *("chunk_attention_backward_keys", "finish_rows", "select_by_number", "select_by_threshold"),
}


def audit(output: Path, *arguments: str, path: Path | None = None) -> list[dict[str, Any]]:
    """Run the audit; the records, which must break no bound."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [path, ROOT])))
    command = [sys.executable, "-m", "benchmarks.audit", *arguments, "--output", str(output)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert output.exists(), done.stderr[-3000:]
    records: list[dict[str, Any]] = json.loads(output.read_text())["kernels"]
    broken = [record for record in records if record["violations"]]
    assert not broken, broken
    assert done.returncode == 0
    return records


@pytest.mark.slow
def test_the_most_used_variants_keep_the_bounds(tmp_path: Path) -> None:
    records = audit(tmp_path / "record.json", "--quick", "--chips", "sm_90")
    assert {record["kernel"] for record in records} == KERNELS | {"attention_forward_boxes"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chip", SHARED_BYTES)
def test_every_variant_keeps_the_bounds(chip: str, tmp_path: Path) -> None:
    """Compiled anew, unless the committed record is of these very sources and versions."""
    committed = json.loads(RECORD.read_text())
    if committed["fingerprints"].get(chip) == fingerprint():
        records = [record for record in committed["kernels"] if record["chip"] == chip]
    else:
        records = audit(tmp_path / "record.json", "--chips", chip)
    assert not [record for record in records if record["violations"]]
    assert {record["kernel"] for record in records} >= KERNELS
    assert {record["head_dim"] for record in records} == {16, 32, 64, 96, 128, 256}


def test_a_record_holds_for_its_sources_alone(tmp_path: Path) -> None:
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    assert fingerprint(tmp_path) == fingerprint()
    for name in ("kernels/forward.py", "kernels/tuning.json", "ops/gpu_chunks.py", "layout.py"):
        path = tmp_path / "compiled_sparse" / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert fingerprint(tmp_path) != fingerprint(), name
        path.write_bytes(before)
    (tmp_path / "compiled_sparse/kernels/another.py").touch()
    assert fingerprint(tmp_path) != fingerprint()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
def test_the_oldest_supported_triton_keeps_the_bounds(chip: str, tmp_path: Path) -> None:
    assert OLD_TRITON.is_dir(), f"no Triton 3.6.0 in {OLD_TRITON}: run `make old-triton`"
    output = tmp_path / "record.json"
    audit(output, "--quick", "--chips", chip, path=OLD_TRITON)
    assert json.loads(output.read_text())["triton"] == "3.6.0"


NEW_SIZES = """
from dataclasses import replace
from benchmarks.audit.cases import Case, launch_helpers, launches
from benchmarks.audit.offline import compiling_for

hashes = []
for grid, text in (((8, 16, 16), 77), ((7, 15, 13), 200), ((1, 32, 16), 16)):
    with compiling_for("sm_90") as compiled:
        for launch in launches(Case("", grid=grid, text=text)):
            launch()
    hashes.append({each.result.hash for each in compiled if each.kernel.startswith("attention")})
assert hashes[0] == hashes[1] == hashes[2], hashes
"""


NEW_CHUNKS = """
from benchmarks.audit.chunk_cases import ChunkCase, chunk_launches
from benchmarks.audit.offline import compiling_for

hashes = []
SIZES = [((8, 16, 16), (4, 16, 16)), ((7, 15, 13), (5, 15, 9)), ((1, 32, 77), (1, 32, 17))]
for grid, tile in SIZES:
    with compiling_for("sm_90", "chunk_attention_forward") as compiled:
        forward, _ = chunk_launches(ChunkCase("", grid=grid, tile=tile))
        forward()
    hashes.append({each.result.hash for each in compiled})
assert len(hashes[0]) == 1
assert hashes[0] == hashes[1] == hashes[2], hashes
"""


@pytest.mark.parametrize("program", [NEW_SIZES, NEW_CHUNKS], ids=["blocks", "chunks"])
def test_a_new_grid_or_text_length_compiles_nothing(program: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


GOOD = Usage(
    registers=128,
    spilled=0,
    shared=65_536,
    matrix=8,
    bulk_loads=4,
    async_copies=16,
    matrix_kind="HGMMA",
)


def complaints(chip: str = "sm_90", kernel: str = "attention_forward", **changes: Any) -> list[str]:
    """What the bounds say of a kernel that is good but for these changes."""
    used = Usage(**(GOOD.as_dict() | changes))
    return list(violations(kernel, chip, used, warps=4, matrix=True, wide_rows=True))


def test_a_good_kernel_breaks_no_bound() -> None:
    assert complaints() == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"spilled": 8}, "8 spilled"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"registers": 600}, "600 registers for 4 warps"),
        ({"matrix_kind": "HMMA"}, "no HGMMA instruction"),
        ({"matrix_kind": ""}, "no HGMMA instruction"),
        ({"bulk_loads": 0, "async_copies": 0}, "rows pass through registers"),
        ({"kernel": "attention_forward_boxes", "bulk_loads": 0}, "no load by the bulk copy engine"),
        ({"chip": "sm_89", "matrix_kind": "HMMA", "shared": 110_000}, "101376 exist"),
        ({"kernel": "attention_forward_quantized", "matrix_kind": "IGMMA HGMMA"}, "no QGMMA"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)
def test_each_bound_can_be_broken(changes: dict[str, Any], complaint: str) -> None:
    (said,) = complaints(**changes)
    assert complaint in said
