"""`compiled-sparse plot`: each picture, its numbers as JSON, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from measured import measured

import compiled_sparse as cs
from compiled_sparse.calibration import errors_by_density
from compiled_sparse.calibration import save_measurements
from compiled_sparse.cli import main
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density

SHAPE = ["--grid", "4", "8", "8", "--heads", "2", "--layers", "3", "--steps", "4"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plot", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    result: dict[str, Any] = json.loads(captured.out)
    assert result["version"] == 1
    assert Path(result["path"]).exists()
    return result


def test_the_order_of_tiles_and_its_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plot", "--order", "--grid", "10", "6", "--tile", "4", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tile_order.png'}\n"
    numbers = drawn(capsys, "--order", "--grid", "9", "--tile", "4", "--output", "a.svg")
    assert numbers["path"] == str(tmp_path / "a.svg")
    assert numbers["tile_sizes"] == [4, 4, 1]
    assert numbers["partial_tiles"] == [2]
    assert (numbers["tokens"], numbers["slots"]) == (9, 12)
    # Without a tile that of the default pattern, with as many axes as the grid.
    assert drawn(capsys, "--order", "--grid", "16", "20")["tile_thw"] == [8, 8]


def test_the_densities_of_a_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = cs.STA(window_thw=(1, 1, 1), tile_thw=(2, 4, 4))
    policy = cs.Policy({"layers.*": config}, dense_first_steps=1)
    (tmp_path / "mine.json").write_text(policy.to_json(), encoding="utf-8")
    numbers = drawn(capsys, "--policy", "mine.json", *SHAPE, "--paths", "layers.{layer}")
    sparse = sta_density(BlockLayout((4, 8, 8), (2, 4, 4)), ((1, 1, 1),))
    assert numbers["densities"] == [[1.0, sparse, sparse, sparse]] * 3
    assert numbers["mean"] == pytest.approx((1 + 3 * sparse) / 4)
    assert Path(numbers["path"]).name == "policy_density.png"
    text = drawn(capsys, "--policy", "vsa:sparsity=0.5", *SHAPE, "--text", "0", "9")
    assert text["text"] == {"before": 0, "after": 9}


def test_measured_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_measurements(measured(), "measured.json")
    numbers = drawn(capsys, "--measurements", "measured.json")
    assert Path(numbers["path"]).name == "measured_errors.png"
    expected = errors_by_density(measured())
    assert [each["relative_error"] for each in numbers["candidates"]] == [
        each.relative_error for each in expected.candidates
    ]
    assert numbers["curve"] == [list(point) for point in expected.curve]


def test_the_numbers_of_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = drawn(capsys, "--grid", "8", "24", "--window", "1", "3", "--tile", "4", "8")
    assert numbers["density"] == pytest.approx(0.5)
    assert (numbers["query_block"], numbers["seen_blocks"]) == (4, [3, 4, 5])
    assert (numbers["query_blocks"], numbers["key_blocks"]) == (6, 6)
    vmoba = drawn(capsys, "--grid", "8", "8", "8", "--mechanism", "vmoba")
    assert 0 < vmoba["density"] < 1


def test_pictures_exclude_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plot", "--order", "--policy", "sta"])
    assert exit_.value.code == 2
    assert "argument --policy: not allowed with argument --order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--order", "--window", "1", "1", "1"], "--window with --order"),
        (["--order", "--seed", "0"], "--seed with --order"),
        (["--policy", "sta", *SHAPE, "--tile", "2", "4", "4"], "--tile with --policy"),
        (["--measurements", "a.json", *SHAPE[:4]], "--grid with --measurements"),
        (["--steps", "3"], "--steps with the picture of a pattern"),
        (["--policy", "sta", *SHAPE[:-2]], "--policy without --steps"),
        (["--policy", "", *SHAPE], "unknown mechanism"),
        (["--policy", "stta", *SHAPE], "unknown mechanism"),
        (["--policy", "missing.json", *SHAPE], "cannot be read"),
        (["--measurements", "missing.json"], "cannot be read"),
        (["--policy", "sta", *SHAPE, "--paths", "blocks"], "tell one layer from another"),
        (["--policy", "sta", "--grid", "8", "8", *SHAPE[4:]], "axes_mismatch"),
        (["--order", "--grid", "4", "8", "--tile", "2", "2", "2"], "different numbers of axes"),
        (["--order", "--grid", "2", "2", "2", "2"], "1 to 3 positive integers"),
        (["--order", "--output", "order.gif"], "no known format"),
        (["--grid", "4", "8", "8", "--output", "pattern"], "no known format"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_without_a_traceback(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plot", *arguments]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert len(captured.err.splitlines()) == 4
    assert not captured.out
    assert not list(tmp_path.iterdir())
