"""`compiled-sparse bench`: figures of this machine, and a clear answer where it cannot tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compiled_sparse.cli import main

SMALL = ["--grid", "4", "6", "8", "--tile", "2", "3", "4", "--heads", "2", "--head-dim", "16"]


def test_one_call_is_timed_beside_the_dense_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--rounds", "1", "--window", "1", "1", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["density"] == pytest.approx(1 / 8)
    assert result["limit"] == pytest.approx(8)
    assert result["speed_up"] == pytest.approx(result["dense_ms"] / result["sparse_ms"])


def test_the_table_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--rounds", "1"]) == 0
    assert "speed_up" in capsys.readouterr().out


def test_tuning_without_a_gpu_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = tmp_path / "tiles.json"
    assert main(["bench", "--tune", str(table)]) == 2
    assert "there is none" in capsys.readouterr().err
    assert not table.exists()
