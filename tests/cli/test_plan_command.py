"""`compiled-sparse plan`: a table or JSON, and an answer to every wrong request."""

from __future__ import annotations

import json

import pytest

from compiled_sparse.chips import CHIPS
from compiled_sparse.cli import main
from compiled_sparse.planning import NOTES
from compiled_sparse.presets import MODELS

SHAPE = ["--grid", "21", "30", "52", "--heads", "12", "--head-dim", "128"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["plan", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    result: dict[str, object] = json.loads(captured.out)
    assert result["version"] == 1
    return result


def test_a_model_is_planned_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--frames", "81", "--height", "480", "--width", "832"]
    assert main(["plan", "--model", "wan2.1-t2v-14b", *size, "--chip", "h100"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("wan2.1-t2v-14b, grid 21x30x52, 32,760 tokens, layers 40")
    assert "published" in lines[1]
    (header,) = (line for line in lines if line.startswith("mechanism"))
    assert header.split()[:6] == ["mechanism", "tile", "blocks", "padding", "density", "gain"]
    assert any(line.startswith("vsa ") and "21.9%" in line for line in lines)
    assert "auto:" in out.partition("does not fit:")[2]
    assert lines[-2:] == list(NOTES)


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--model", "hunyuanvideo", "--chip", "a100", "--batch", "2")
    assert result["text"] == {"before": 0, "after": 256}
    assert result["tokens"] == 119056
    assert result["model_notes"] == MODELS["hunyuanvideo"].notes
    assert result["chip"]["assumed"]  # type: ignore[index]
    rows = {row["mechanism"]: row for row in result["rows"]}  # type: ignore[attr-defined]
    assert rows["vsa"]["milliseconds"] < result["dense_ms"]
    assert rows["auto"]["reason"] == "device_unsupported"


def test_a_shape_is_planned_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    specs = ["--mechanism", "vsa:sparsity=0.8", "--mechanism", "sta:window_thw=3x3,tile_thw=8x8"]
    result = planned(capsys, *SHAPE, "--text", "0", "226", *specs, "--tflops", "0.1")
    first, second = result["rows"]  # type: ignore[misc]
    assert first["spec"].startswith("vsa:sparsity=0.8")
    assert first["milliseconds"] == pytest.approx(result["dense_ms"] / first["gain"])  # type: ignore[operator]
    assert first["whole_gain"] is None
    assert second["reason"] == "axes_mismatch"


def test_a_plan_in_which_nothing_fits_is_made_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *SHAPE, "--training", "--mechanism", "sage_sla"]) == 0
    out = capsys.readouterr().out
    assert "forward_only (a gradient is needed)" in out
    assert "mechanism  tile" not in out


def test_models_and_chips_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*MODELS, *CHIPS))
    assert main(["plan", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed["models"]] == list(MODELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither"),
        (["--model", "wan2.1-t2v-14b", "--heads", "3"], "--model, --heads"),
        ([*SHAPE, "--frames", "81"], "--grid, --heads, --head-dim, --frames"),
        (["--grid", "1", "2", "3"], "a plan is for a model or for a shape"),
        (["--model", "wan9"], "UnknownModelError"),
        (["--model", "ltx-video", "--height", "500"], "height=480 or 512"),
        ([*SHAPE, "--chip", "tpu"], "this chip is not known"),
        ([*SHAPE, "--mechanism", "vsb"], "unknown mechanism"),
    ],
)
def test_a_request_that_cannot_be_right_ends_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert message in captured.err


@pytest.mark.parametrize("tflops", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none_ends_with_status_2(tflops: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *SHAPE, "--tflops", tflops])
    assert caught.value.code == 2
