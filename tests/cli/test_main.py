"""The command line: arguments, exit status, what goes to which stream."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from compiled_sparse.cli import main


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"compiled_sparse {metadata.version('compiled-sparse')}\n"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["bench"],
        ["calibrate"],
        ["calibrate", "run"],
        ["calibrate", "search"],
        ["calibrate", "tune"],
        ["calibrate", "tune-cfg"],
        ["completion"],
        ["demo"],
        ["doctor"],
        ["explain"],
        ["plan"],
        ["plot"],
    ],
)
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "compiled-sparse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["demoo"], "demoo"),
        (["demo", "--grid", "3", "4"], "expected 3 arguments"),
        (["demo", "--grid", "a", "4", "4"], "invalid int value: 'a'"),
        (["demo", "--layers", "0"], "0 is less than 1"),
        (["demo", "--layers", "two"], "invalid integer value: 'two'"),
        (["demo", "--dtype", "int8"], "int8"),
    ],
)
def test_a_wrong_argument_is_refused_with_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert not captured.out


def test_an_interruption_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("compiled_sparse.cli.plan.run", interrupted)
    assert main(["plan", "--list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = [sys.executable, "-m", "compiled_sparse", "plan", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == b""


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compiled_sparse", "plot", "--output", "pattern.svg"]
    grid = ["--grid", "4", "8", "8", "--tile", "2", "4", "4", "--text", "0", "5"]
    done = subprocess.run(
        [*command, *grid, "--query-tile", "0", "1", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == tmp_path / "pattern.svg"
    assert (tmp_path / "pattern.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_an_error_of_the_package_is_printed_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "pattern.png"
    assert main(["plot", "--grid", "0", "8", "8", "--output", str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("LayoutError: grid is not a tuple of axis lengths\n  got: ")
    assert "Traceback" not in captured.err
    assert not path.exists()


def test_a_mechanism_is_drawn_by_its_spec(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = ["--mechanism", "vsa:sparsity=0.5,tile_thw=2x4x4", "--grid", "4", "8", "8"]
    assert main(["plot", *spec, "--seed", "1"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "vsa_pattern.png"
    assert (tmp_path / "vsa_pattern.png").exists()
    assert main(["plot", "--mechanism", "swba:block=16", *spec[2:], "--query-tile", "3"]) == 0
    assert (tmp_path / "swba_pattern.png").exists()


def test_a_mechanism_and_a_window_are_refused_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plot", "--mechanism", "vsa", "--window", "3", "3", "3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ConfigError: --mechanism says all there is to say about the mechanism",
        "  got:      --mechanism vsa and --window",
        "  expected: --mechanism, or --window and --tile",
        "  next:     write --mechanism sta:window_thw=3x3x3,tile_thw=6x8x8, for instance",
    ]
