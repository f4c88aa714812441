"""`compiled-sparse calibrate`: from a function that names a model to a policy that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import GRID
from modules import TinyDiT
from modules import dit_inputs

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse.calibration import Strategy
from compiled_sparse.cli import main
from compiled_sparse.policy import Policy
from compiled_sparse.policy import as_policy

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ENTRY = """
import sys
sys.path.insert(0, {tests!r})
import torch
from modules import TinyDiT, dit_inputs
from compiled_sparse.calibration import Call, CallKey

def calls():
    torch.manual_seed(0)
    model, inputs = TinyDiT(2).requires_grad_(False).eval(), dit_inputs()
    branches = ("positive", "negative")
    keys = [CallKey(sample="a cat", step=s, branch=b) for s in range(2) for b in branches]
    return model, [Call(args=inputs, key=key) for key in keys]
"""
WINDOWS = ("1x1x1", "1x1x3", "3x3x1")
CANDIDATES = [
    part
    for window in WINDOWS
    for part in ("--candidate", f"sta:window_thw={window},tile_thw=1x2x2")
]


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "entry.py"
    path.write_text(ENTRY.format(tests=str(Path(__file__).parents[1])))
    return f"{path}:calls"


def test_run_writes_the_policy_that_meets_the_target(
    entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", "run", entry, *CANDIDATES, "--inner", "eager", "--json"]
    journal = ["--journal", "run.journal", "--measurements", "found.json"]
    assert main([*arguments, *journal, "--min-gain", "1.5"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["version"] == 1
    assert result["predicted_gain"] >= 1.5
    assert result["calls"] == 4
    assert result["steps"] == [0, 1]
    assert result["layers"] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert [row["density"] for row in result["candidates"]] == sorted(
        row["density"] for row in result["candidates"]
    )
    policy = as_policy(tmp_path / "policy.json")
    found = calibration.load_measurements(tmp_path / "found.json")
    assert calibration.fit(found, min_gain=1.5).policy == policy
    # The policy runs the model it was made for.
    model, inputs = TinyDiT(2).requires_grad_(False).eval(), dit_inputs()
    options = {"policy": str(tmp_path / "policy.json"), "inner": "eager", "strict": True}
    with torch.no_grad(), cs.metadata(step=1):
        torch.compile(model, backend="compiled_sparse", options=options)(*inputs)
    # A second run measures nothing again and says the same.
    assert main([*arguments, *journal, "--min-gain", "1.5"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_run_says_what_was_measured_and_chosen(
    entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "run", entry, *CANDIDATES, "--inner", "eager"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["candidate", "density", "error", "cosine", "mass", "places"]
    assert [line.split()[0] for line in lines[1:4]] == CANDIDATES[1::2]
    assert lines[4].startswith("dense attention")
    places = sum(int(line.split()[-1]) for line in lines[1:5])
    assert places == 2 * 2 * 2  # steps, layers, heads
    assert lines[-1] == "policy.json"


def test_captured_calls_are_calibrated_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with calibration.capture("captured", grid_thw=GRID):
        TinyDiT(2).requires_grad_(False)(*dit_inputs())
    arguments = ["calibrate", "run", "--captured", "captured", "--json"]
    specs = ["--candidate", "vsa:sparsity=0.5,tile_thw=2x3x2"]
    assert main([*arguments, *specs, "--max-error", "10"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == ["layer.0", "layer.1"]
    assert as_policy(tmp_path / "policy.json").match("layer.1") is not None


def test_search_tune_and_tune_cfg_go_through_published_files(
    entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = [part for window in ("1,1,1", "3, 3, 1") for part in ("--window", window)]
    tile = ["--tile", "1", "2", "2"]
    search = ["calibrate", "search", entry, *windows, *tile, "--inner", "eager", "--json"]
    assert main([*search, "--output", "pos", "--negative-output", "neg"]) == 0
    found = json.loads(capsys.readouterr().out)
    full = ",".join(map(str, found["full_window"]))
    assert full == "3,2,3"
    assert [Path(name).parent.name for name in found["files"]] == ["neg", "pos"]
    losses = json.loads(Path(found["files"][1]).read_text())
    assert set(losses) == {"L2_loss", "L1_loss"}
    assert set(losses["L2_loss"]) == {"[1, 1, 1]", "[3, 3, 1]", "[3, 2, 3]"}

    shared = ["--full-window", full, "--dense-first-steps", "1", "--json"]
    assert main(["calibrate", "tune", "pos", *shared, "--output", "s.json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    strategy = Strategy.from_published(tmp_path / "s.json")
    assert strategy.shape == (2, 2, 2)
    assert set(strategy.windows[0][0]) == {(3, 2, 3)}
    assert tuned["nominal_sparsity"] == pytest.approx(strategy.nominal_sparsity((3, 2, 3)))
    assert sum(tuned["usage"].values()) == 8

    policy = ["--policy", "p.json", *tile]
    assert main(["calibrate", "tune-cfg", "pos", "neg", *shared, *policy]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["files"] == ["mask_strategy.json", "p.json"]
    ((_, config),) = Policy.from_json((tmp_path / "p.json").read_text()).rules
    assert isinstance(config, cs.STA)
    assert config.table == Strategy.from_published(tmp_path / "mask_strategy.json").to_table()
    assert config.tile_thw == (1, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "there is nothing to measure"),
        (["run", "missing.py:calls", "--candidate", "sta"], "there is no such file"),
        (["run", "--candidate", "stq", "--captured", "x"], "unknown mechanism"),
        (["tune", "nowhere", "--full-window", "3,3,3"], "nowhere"),
        (["tune", ".", "--full-window", "3x3x3"], "3x3x3"),
    ],
)
def test_wrong_requests_are_answered_in_words(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_the_demo_goes_through_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "run", "--demo", "--max-error", "0.5", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["relative_error"] <= 0.5
    assert main(["calibrate", "search", "--demo"]) == 0
    assert "full window: 1,4,4" in capsys.readouterr().out


def test_a_target_out_of_range_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    journal = tmp_path / "run.journal"
    arguments = ["calibrate", "run", "--demo", "--inner", "eager", "--journal", str(journal)]
    assert main([*arguments, "--max-error", "nan"]) == 2
    assert "fitted to one target" in capsys.readouterr().err
    assert not journal.exists()
