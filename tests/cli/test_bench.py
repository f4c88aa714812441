"""`compiled-sparse bench`: figures of this machine, and a clear answer where it cannot tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_sparse import registry
from compiled_sparse.cli import main

SMALL = ["--grid", "4", "6", "8", "--tile", "2", "3", "4", "--heads", "2", "--head-dim", "16"]


def test_one_call_is_timed_beside_the_dense_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--rounds", "1", "--window", "1", "1", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["density"] == pytest.approx(1 / 8)
    assert result["limit"] == pytest.approx(8)
    assert result["speed_up"] == pytest.approx(result["dense_ms"] / result["sparse_ms"])


TINY = ["--grid", "4", "6", "8", "--heads", "2", "--head-dim", "16", "--rounds", "1"]


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *TINY, *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["version"] == 1
    assert result["share_of_limit"] == pytest.approx(result["speed_up"] / result["limit"])
    assert result["limit"] == pytest.approx(1 / result["density"])
    return result


@pytest.mark.parametrize("name", sorted(each.name for each in registry.mechanisms()))
def test_any_mechanism_is_timed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    head_dim = ["--head-dim", "64"] if name == "sage_sla" else []
    result = measured(capsys, "--mechanism", name, *head_dim)
    assert result["config"].startswith(name)
    assert 0.0 < result["density"] <= 1.0


def test_learned_parts_and_text_take_part(capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", "3", "5"]
    gated = measured(capsys, "--mechanism", "vsa:tile_thw=2x3x4,gate=to_gate_compress", *text)
    assert gated["learned"] == "gate"
    assert gated["text"] == [3, 5]
    assert measured(capsys, "--mechanism", "sla", *text)["learned"] == "proj"
    assert measured(capsys, "--mechanism", "sla:proj=none")["learned"] == "none"


def test_a_layer_is_chosen_where_layers_differ(capsys: pytest.CaptureFixture[str]) -> None:
    spec = "vmoba:first_full_layer=1,first_full_step=2,moba_select_mode=topk"
    frames = measured(capsys, "--mechanism", spec, "--layer", "1")["config"]
    rows = measured(capsys, "--mechanism", spec, "--layer", "2")["config"]
    assert frames != rows
    assert main(["bench", *TINY, "--mechanism", spec]) == 2
    assert "a layer that is not dense" in capsys.readouterr().err


@pytest.mark.slow
def test_flex_attention_is_timed_with_the_same_blocks(
    capsys: pytest.CaptureFixture[str], fresh_compiler: None
) -> None:
    arguments = ["--mechanism", "swba:block=128,window=2", "--grid", "4", "8", "16"]
    result = measured(capsys, *arguments, "--flex", "--dtype", "float32")
    assert result["flex_speed_up"] == pytest.approx(result["dense_ms"] / result["flex_ms"])


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
