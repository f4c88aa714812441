"""The harness of `make gpu-check`, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import peers
from benchmarks.gpu import speed
from benchmarks.gpu.bounds import bound
from benchmarks.gpu.cases import check_cases
from benchmarks.gpu.environment import peaks
from benchmarks.gpu.record import Record
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.speed_cases import WAN_14B
from benchmarks.gpu.speed_cases import Shape
from benchmarks.gpu.speed_cases import SpeedCase
from benchmarks.gpu.speed_cases import speed_cases
from benchmarks.gpu.supervisor import Job
from benchmarks.gpu.supervisor import supervise
from compiled_sparse import ops
from compiled_sparse.ops.block_sparse import block_sparse_attention

QUICK = ["--device", "cpu", "--quick"]
SPARSE = "compiled_sparse"

FAKE_WORKER = """
import json, os, sys, time
def emit(**event):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(event) + chr(10))
for name in json.load(sys.stdin):
    emit(started=name)
    if name == "dies":
        print("an illegal memory access", flush=True)
        os._exit(7)
    if name == "hangs":
        time.sleep(600)
    emit(case=name, status="passed")
    if name == "loses the context":
        sys.exit(3)
"""


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and record of a run."""
    status = command.main([*QUICK, "--output", str(folder), *arguments])
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("record"), "--in-process")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("gpu check")  # both read one run
def test_everything_passes_and_is_in_the_record(whole: tuple[int, dict[str, Any]]) -> None:
    status, record = whole
    assert record["failures"] == []
    assert (status, record["status"]) == (0, "passed")
    assert list(record["sections"]) == ["correctness", "operators", "model", "speed"]
    for section in record["sections"].values():
        assert section["cases"]
        assert all(case["status"] == "passed" for case in section["cases"])
    facts = record["environment"]
    assert facts["torch"] == torch.__version__
    assert {"device", "triton", "cuda", "driver", "commit", "date"} <= set(facts)
    assert record["seconds"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("gpu check")  # both read one run
def test_a_measurement_has_times_rates_and_its_bound(whole: tuple[int, dict[str, Any]]) -> None:
    cases = whole[1]["sections"]["speed"]["cases"]
    forward, backward, sta, *chunks = cases
    assert [case["pattern"] for case in chunks] == ["chunks", "chunks"]
    for case in cases:
        assert case["milliseconds"][SPARSE] > 0
        assert case["tflops"][SPARSE] > 0
        assert case["mfu"][SPARSE] is None
        assert case["bound"]["flop"] > 0
        assert case["bound"]["bytes"] > 0
        assert case["dense_backend"] == "flash"
        assert 0 < case["density"] < 1
    assert forward["milliseconds"]["flex_attention"] > 0
    assert "no attribute" not in str(backward["peers"]["flex_attention"])
    assert set(forward["moving_tokens"]) >= {"in place", "moving there", "kernel on runs", "total"}
    assert sta["window"] is not None


Fault = Callable[..., tuple[Tensor, Tensor]]


def _too_large(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, lse = block_sparse_attention(*args, **kwargs)
    return 1.01 * out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _forgets_a_block(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(q, k, v, indices, (counts - 1).clamp_min(0), **kwargs)


def _wrong_gradient(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(2 * q - q.detach(), *args, **kwargs)


def _packed(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, lse = block_sparse_attention(*args, **kwargs)
    return out.contiguous(), lse


def _noisy(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, lse = block_sparse_attention(*args, **kwargs)
    return out, lse + 1e-7 * lse.abs().nan_to_num(0, 0, 0) * torch.rand_like(lse)


def _reads_hidden_keys(q: Tensor, *args: Any, key_mask: Any, **kwargs: Any) -> Any:
    return block_sparse_attention(q, *args, key_mask=None, **kwargs)


def _raises(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no such kernel")


FAULTS: dict[str, tuple[Fault, str]] = {
    "values": (_too_large, "out: "),
    "a block": (_forgets_a_block, "lse"),
    "a gradient": (_wrong_gradient, "grad_q: "),
    "strides": (_packed, "not BLHD memory"),
    "bits": (_noisy, "two equal calls differ in lse"),
    "hidden keys": (_reads_hidden_keys, "NaN"),
    "an error": (_raises, "no such kernel"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_a_failure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, message = FAULTS[name]
    monkeypatch.setattr(ops, "block_sparse_attention", fault)
    status, record = run(tmp_path, "--in-process", "--sections", "correctness", "--only", "kv_head")
    assert (status, record["status"]) == (1, "failed")
    (failure,) = record["failures"]
    assert message in failure["message"]
    assert f"FAILED correctness: {failure['case']}" in capsys.readouterr().out


def test_a_measurement_of_wrong_results_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "block_sparse_attention", _too_large)
    status, record = run(tmp_path, "--in-process", "--sections", "speed", "--only", "sta")
    assert status == 1
    (case,) = record["sections"]["speed"]["cases"]
    assert "milliseconds" not in case


def test_without_time_nothing_runs_and_the_record_says_so(tmp_path: Path) -> None:
    start = time.time()
    status, record = run(tmp_path, "--minutes", "0")
    assert time.time() - start < 10
    assert (status, record["status"]) == (2, "incomplete")
    cases = [case for section in record["sections"].values() for case in section["cases"]]
    assert len(cases) > 10
    assert {case["message"] for case in cases} == {"not run: out of time"}


def test_benchmarks_that_time_left_no_room_for_are_no_failure(tmp_path: Path) -> None:
    status, record = run(tmp_path, "--minutes", "0", "--sections", "speed")
    assert (status, record["status"]) == (0, "passed")


def test_checks_run_in_processes_of_their_own(tmp_path: Path) -> None:
    status, record = run(tmp_path, "--sections", "correctness", "--only", "lists none")
    assert status == 0
    (case,) = record["sections"]["correctness"]["cases"]
    assert case["status"] == "passed"


def supervised(names: list[str], seconds: float = 60, script: str = FAKE_WORKER) -> dict[str, Any]:
    """What becomes of cases that a pretended worker runs."""
    results: dict[str, Any] = {}
    supervise(
        [Job("section", names)],
        Settings("cpu", True, time.time() + seconds),
        lambda _, result: results.update({result["case"]: result}),
        parallel=2,
        command=lambda _section, _settings, events: [sys.executable, "-c", script, str(events)],
        case_seconds=2,
    )
    return results


def test_a_crash_or_a_hang_costs_one_case() -> None:
    names = ["first", "dies", "loses the context", "hangs", "last"]
    results = supervised(list(names))
    assert sorted(results) == sorted(names)
    failed = {name: r["message"] for name, r in results.items() if r["status"] == "failed"}
    assert failed == {
        "dies": "an illegal memory access\nthe process died with status 7",
        "hangs": "stopped after 2 s without an end",
    }
    assert all(results[n]["status"] == "passed" for n in ("first", "loses the context", "last"))


def test_a_process_that_cannot_begin_loses_all_its_cases() -> None:
    results = supervised(["a", "b"], script="raise SystemExit('no torch')")
    assert {r["message"] for r in results.values()} == {"no torch\nthe process died with status 1"}


def test_at_the_deadline_a_case_is_stopped_and_counts_as_not_run() -> None:
    start = time.time()
    results = supervised(["first", "hangs", "last"], seconds=1)
    assert time.time() - start < 5
    assert results["first"]["status"] == "passed"
    assert {results[name]["status"] for name in ("hangs", "last")} == {"not run"}


def test_the_record_is_whole_after_every_case(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "record.json", {}, {})
    record.add("speed", {"case": "one", "status": "failed", "message": "wrong"})
    written = json.loads(record.path.read_text())
    assert written["status"] == "running"
    assert written["failures"] == [{"section": "speed", "case": "one", "message": "wrong"}]


def test_names_tell_cases_apart_and_the_most_important_come_first() -> None:
    names = [case.name for case in check_cases()]
    assert len(names) == len(set(names)) > 100
    measured = speed_cases()
    assert len({case.name for case in measured}) == len(measured)
    assert measured[0].shape == WAN_14B
    assert (measured[0].tile, measured[0].sparsity) == ((4, 4, 4), 0.9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (989.4, 3.35)),
        ("NVIDIA H100 PCIe", (756.0, 2.0)),
        ("NVIDIA GH200 480GB", (989.4, None)),
        ("NVIDIA A100-SXM4-80GB", (312.0, 2.039)),
        ("a chip of tomorrow", (None, None)),
    ],
)
def test_peaks_go_by_the_name_of_the_chip(
    name: str, expected: tuple[float | None, float | None]
) -> None:
    assert peaks(name) == expected


def test_the_bound_is_arithmetic_at_the_peak_of_the_chip() -> None:
    tokens, heads = 75600, 40
    work = {"pairs": heads * tokens**2 // 10, "tokens": tokens, "heads": heads, "head_dim": 128}
    forward = bound(**work, backward=False, chip="NVIDIA H200")
    assert forward["limited_by"] == "arithmetic"
    assert forward["milliseconds"] == pytest.approx(11.83, abs=0.01)
    backward = bound(**work, backward=True, chip="NVIDIA H200")
    assert backward["milliseconds"] == pytest.approx(2.5 * forward["milliseconds"])
    assert bound(**work, backward=True, chip="unknown")["milliseconds"] is None


@pytest.fixture
def measured_case() -> tuple[SpeedCase, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    case = SpeedCase(Shape("odd", (3, 6, 9), 2, text=5, head_dim=16), (2, 2, 4), 0.5)
    generator = torch.Generator().manual_seed(0)
    inputs = speed.random_inputs(case.shape, generator)
    return case, inputs, *speed.block_lists(case, generator)


def test_moved_tokens_attend_as_those_in_place(measured_case: Any) -> None:
    case, inputs, indices, counts = measured_case
    expected = speed._attend(case.layout, indices, counts, *inputs)
    order = peers.TileOrder.of(case.layout, indices.device)
    moved = order.runs(indices, counts)(*(order.move(each) for each in inputs))
    back = moved[:, :, order.place_of_tokens()]
    torch.testing.assert_close(back, expected)


def test_flex_attention_gets_the_same_blocks(measured_case: Any) -> None:
    case, _, indices, counts = measured_case
    order, note = peers.flex_order(case.layout, indices.device)
    assert "mask function" in note
    mask = peers._flex_mask(order, indices, counts)
    listed = torch.zeros(1, 2, case.layout.num_blocks, case.layout.num_blocks)
    listed.scatter_(-1, indices.long(), 1)
    assert torch.equal(mask.to_dense().bool(), listed.bool())


def test_pairs_are_those_of_the_tokens(measured_case: Any) -> None:
    case, inputs, indices, counts = measured_case
    sizes = case.layout.block_sizes
    expected = sum(
        sizes[row] * sum(sizes[block] for block in indices[0, head, row].tolist())
        for head in range(2)
        for row in range(len(sizes))
    )
    assert speed._pairs(case, indices, counts) == expected
    assert inputs[0].shape[2] == sum(sizes)
