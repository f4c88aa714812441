"""A calibration that is killed at any moment goes on, and ends with the same file."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
from modules import TinyDiT, dit_inputs
from compiled_sparse import calibration
from compiled_sparse.calibration import Call, CallKey

torch.manual_seed(0)
model, inputs = TinyDiT(2).requires_grad_(False).eval(), dit_inputs()
print("ready", flush=True)
calls = (Call(args=inputs, key=CallKey(step=step)) for step in range(30))
candidates = ["sta:window_thw=1x1x1,tile_thw=2x3x2", "vsa:sparsity=0.5,tile_thw=2x3x2"]
found = calibration.measure(model, calls, candidates, inner="eager", journal={journal!r})
calibration.save_measurements(found, {output!r})
policy = calibration.fit(found, max_error=0.3).policy
"""


def command(folder: Path) -> list[str]:
    paths = {name: str(folder / f"run.{name}") for name in ("journal", "output")}
    return [sys.executable, "-c", RUN.format(tests=str(Path(__file__).parents[1]), **paths)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_killed_runs_end_with_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    subprocess.run(command(whole), check=True, capture_output=True)
    moments = random.Random(0)
    journal, lines = killed / "run.journal", []
    for _ in range(20):
        with subprocess.Popen(command(killed), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()  # all is imported: what follows is the run
            time.sleep(moments.uniform(0, 4))
            process.send_signal(signal.SIGKILL)
        lines.append(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
        assert lines == sorted(lines), "entries were lost"
    subprocess.run(command(killed), check=True, capture_output=True)
    assert (killed / "run.output").read_bytes() == (whole / "run.output").read_bytes()
    assert journal.read_bytes() == (whole / "run.journal").read_bytes()
    assert len(set(lines)) > 1, "every run was killed before it wrote anything"
