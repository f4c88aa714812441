"""The demo, at sizes and with a compiler that take seconds."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_sparse.cli import main
from compiled_sparse.cli import trial
from compiled_sparse.cli.compilers import InnerCompilerError
from compiled_sparse.cli.measure import Agreement
from compiled_sparse.cli.measure import Timing
from compiled_sparse.cli.measure import compare
from compiled_sparse.cli.measure import medians
from compiled_sparse.cli.wan import video_size

SMALL = ["--grid", "3", "7", "10", "--window", "1", "1", "3", "--tile", "2", "3", "4"]
SMALL += ["--layers", "2", "--heads", "2", "--head-dim", "16", "--rounds", "2"]
EAGER = [*SMALL, "--inner", "eager"]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def test_the_demo_reports_compares_times_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", *EAGER]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    lines = captured.out.splitlines()
    assert "video of 9 frames of 112x160: grid 3x7x10, 210 tokens" in lines
    assert any(line.startswith("blocks.{0-1}.attn1") and "sparse" in line for line in lines)
    assert any(line.endswith("cross_attention") for line in lines)
    assert "Compiled sparse model against the reference: passed" in lines
    assert "Time per forward, median of 2 interleaved rounds" in lines
    assert f"Attention pattern drawn: {tmp_path / 'sta_pattern.png'}" in lines
    assert (tmp_path / "sta_pattern.png").stat().st_size > 0
    assert max(map(len, lines[:-1])) <= 80


def test_json_is_all_that_goes_to_standard_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "new" / "p.svg"
    assert main(["demo", *EAGER, "--json", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "Build the model" in captured.err
    assert result["passed"]
    assert result["problems"] == []
    assert result["inner"] == "eager"
    assert result["picture"] == str(output)
    assert [site["decision"] for site in result["report"]["sites"]] == ["sparse", "dense"] * 2
    agreement, timing = result["agreement"], result["timing"]
    assert agreement["relative_error"] < agreement["tolerance"] < result["dense_difference"]
    assert timing["density"] == result["report"]["sites"][0]["density"]
    assert timing["speedup"] == pytest.approx(timing["dense"] / timing["sparse"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_low_precision_model_passes_and_would_not_if_it_had_stayed_dense(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *EAGER, "--rounds", "0", "--dtype", dtype, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["timing"] is None
    assert result["dense_difference"] > 2 * result["agreement"]["tolerance"]


@pytest.mark.slow
def test_the_demo_runs_with_inductor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inner"] == "inductor"


def test_a_call_that_cannot_be_sparse_ends_the_demo_with_status_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", *EAGER, "--head-dim", "514", "--heads", "1", "--layers", "1"]) == 1
    out = capsys.readouterr().out
    assert "head_dim_unsupported" in out
    assert "FAILED: 0 calls can be sparse, expected 1" in out
    assert not Path("sta_pattern.png").exists()


def test_an_output_that_disagrees_ends_the_demo_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(actual: torch.Tensor, expected: torch.Tensor) -> Agreement:
        return dataclasses.replace(compare(actual, expected), relative_error=float("nan"))

    monkeypatch.setattr(trial, "compare", disagree)
    assert main(["demo", *EAGER, "--rounds", "0"]) == 1
    out = capsys.readouterr().out
    assert "Compiled sparse model against the reference: FAILED" in out
    assert "FAILED: the sparse model does not agree with the reference" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "3", "0", "10"], "LayoutError: --grid is not a tuple of axis lengths"),
        (["--window", "1", "-3", "3"], "ConfigError: STA.window_thw is not made of positive"),
        (["--head-dim", "15"], "ConfigError: Wan's rotary embedding cannot take this head size"),
    ],
)
def test_a_request_that_cannot_be_right_ends_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *EAGER, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib", "diffusers"])
def test_a_missing_package_is_named_before_any_work_is_done(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", *EAGER]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.splitlines() == [
        f"MissingExtraError: the demo needs the optional package '{package}'",
        f"  got:      import {package} failed",
        f"  expected: {package} installed",
        "  next:     pip install 'compiled_sparse[demo]'",
    ]


def test_without_a_working_inductor_the_demo_uses_eager_unless_inductor_was_named(
    tmp_path: Path,
) -> None:
    no_compiler = {"cpp.cxx": (None, str(tmp_path / "no-compiler")), "force_disable_caches": True}
    with torch._inductor.config.patch(no_compiler):
        assert trial._working_inner(None) == "eager"
        with pytest.raises(InnerCompilerError) as caught:
            trial._working_inner("inductor")
    assert "C++ compiler" in caught.value.got
    assert "--inner eager" in caught.value.next_step


def test_timing_takes_medians_of_calls_made_in_turn() -> None:
    made: list[str] = []

    def call(name: str) -> Any:
        return lambda: made.append(name)

    seconds = medians({"a": call("a"), "b": call("b")}, 3, lambda: made.append("|"))
    assert "".join(made) == "ab|ab|ab|"
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0.0 for value in seconds.values())


def test_the_ideal_speed_up_leaves_the_rest_of_the_model_as_it_was() -> None:
    half = Timing(rounds=1, dense=2.0, sparse=1.6, dense_attention=1.0, density=0.2)
    assert half.speedup == pytest.approx(1.25)
    assert half.ideal == pytest.approx(2.0 / (1.0 + 0.2))
    noisy = dataclasses.replace(half, dense_attention=3.0)
    assert noisy.ideal == pytest.approx(1 / 0.2)


def test_errors_are_measured_in_double_precision() -> None:
    expected = torch.tensor([3.0, 4.0], dtype=torch.float16)
    found = compare(torch.tensor([3.0, 4.5], dtype=torch.float16), expected)
    assert found.max_error == 0.5
    assert found.relative_error == pytest.approx(0.1)
    assert not found.passed
    assert compare(expected, expected).passed


def test_the_default_grid_is_17_frames_of_480p() -> None:
    assert video_size((5, 30, 52)) == (17, 480, 832)
