"""`compiled-sparse explain`: a model named on the command line, as text, JSON and a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from modules import GRID
from modules import POLICY

from compiled_sparse.cli import main
from compiled_sparse.policy import Policy

MODEL = """
import torch
from modules import Attention, TinyDiT, dit_inputs, tokens

def by_position():
    return TinyDiT(), dit_inputs(), {}

def unproven():
    return Attention(), (tokens(),), {}

def other_inputs():
    return TinyDiT(), {"nothing": 1}
"""
SPEC = ["--policy", POLICY.describe()]
FLAT = ["--policy", "sta:window_thw=3x3,tile_thw=2x2"]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def model(tmp_path: Path, loaded_entries: None) -> str:
    """The path of a file with models."""
    path = tmp_path / "model.py"
    path.write_text(MODEL, encoding="utf-8")
    return str(path)


def test_the_report_is_printed_as_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:by_position", *SPEC]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("2 of 4 attention calls sparse, density 0.125")
    assert "blocks.{0-1}.attn1 (2 calls)" in captured.out
    assert not captured.err


def test_json_and_a_page_hold_the_same_report(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, page = tmp_path / "policy.json", tmp_path / "report.html"
    policy.write_text(Policy({"blocks.0.*": POLICY, "*": "dense"}).to_json(), encoding="utf-8")
    arguments = ["--policy", str(policy), "--json", "--html", str(page)]
    assert main(["explain", f"{model}:by_position", *arguments]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["version"] == 1
    assert [site["decision"] for site in document["sites"]] == ["sparse", "dense", "dense", "dense"]
    assert captured.err == f"{page}\n"
    assert "blocks.0.attn1" in page.read_text(encoding="utf-8")


def test_a_grid_that_the_graph_does_not_show_is_given(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{model}:unproven", *SPEC]) == 0
    assert "layout_unknown" in capsys.readouterr().out
    grid = ["--grid", *map(str, GRID), "--text", "0", "0"]
    assert main(["explain", f"{model}:unproven", *SPEC, *grid]) == 0
    assert "1 of 1 attention calls sparse" in capsys.readouterr().out


def test_a_step_is_that_of_the_schedule(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(
        Policy({"*": POLICY}, dense_first_steps=2, dense_last_steps=1).to_json(), encoding="utf-8"
    )
    command = ["explain", f"{model}:by_position", "--policy", str(policy), "--num-steps", "5"]
    sparse = []
    for step in ("1", "2", "4"):
        assert main([*command, "--step", step, "--strict"]) == 0
        sparse.append(capsys.readouterr().out.split(" of ")[0])
    assert sparse == ["0", "2", "0"]


def test_strict_fails_where_a_named_call_stays_dense(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{model}:by_position", *SPEC, "--strict"]) == 0
    assert main(["explain", f"{model}:by_position", *FLAT]) == 0
    assert not capsys.readouterr().err
    assert main(["explain", f"{model}:by_position", *FLAT, "--strict"]) == 1
    captured = capsys.readouterr()
    assert "0 of 4 attention calls sparse" in captured.out
    assert captured.err.startswith("strict: 2 attention calls the policy wants sparse stay dense")


@pytest.mark.slow
def test_the_model_of_the_demo_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "--demo", "--grid", "2", "5", "4", "--policy", "swba:block=8,window=2"]
    assert main([*command, "--json", "--strict"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [site["decision"] for site in sites] == ["sparse", "dense"] * 2
    assert sites[0]["grid_thw"] == [40]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{model}:other_inputs"], "unexpected keyword argument 'nothing'"),
        (["{model}:by_position", "--demo"], "one model is explained at a time"),
        (["{model}:by_position", "--policy", "stta"], "unknown mechanism"),
        (["{model}:by_position", "--step", "3", "--num-steps", "3"], "not one of the steps"),
        (["{model}:by_position", "--text", "0", "5"], "metadata without a grid"),
        (["--demo", "--grid", "0", "3", "3"], "is not a tuple of axis lengths"),
    ],
)
def test_what_cannot_be_explained_is_an_error_without_a_traceback(
    arguments: list[str], complaint: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *(each.format(model=model) for each in arguments)]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == 4
    assert not captured.out


def test_a_page_without_matplotlib_is_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = tmp_path / "report.html"
    assert main(["explain", "nowhere.py:build", "--html", str(page)]) == 2
    assert "compiled_sparse[plots]" in capsys.readouterr().err
    assert not page.exists()
