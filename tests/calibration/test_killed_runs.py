"""A calibration that is killed at any moment goes on, and ends with the same file."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CALLS = 250
RUN = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from modules import TinyDiT, dit_inputs
from compiled_sparse import calibration
from compiled_sparse.calibration import Call, CallKey

torch.manual_seed(0)
model, inputs = TinyDiT(2).requires_grad_(False).eval(), dit_inputs()
calls = (Call(args=inputs, key=CallKey(step=step)) for step in range({calls}))
candidates = ["sta:window_thw=1x1x1,tile_thw=2x3x2", "vsa:sparsity=0.5,tile_thw=2x3x2"]
held = len(open({journal!r}).readlines()) - 1 if {resumed} else 0

def done(key):
    if key.step >= held:  # a call that was measured now
        print("measured", flush=True)
        time.sleep(0.01)

settings = dict(inner="eager", journal={journal!r}, on_call=done)
found = calibration.measure(model, calls, candidates, **settings)
calibration.save_measurements(found, {output!r})
"""


def command(folder: Path) -> list[str]:
    journal = folder / "run.journal"
    settings = {
        "tests": str(Path(__file__).parents[1]),
        "calls": CALLS,
        "journal": str(journal),
        "output": str(folder / "run.output"),
        "resumed": journal.exists(),
    }
    return [sys.executable, "-c", RUN.format(**settings)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_killed_runs_end_with_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    begun = time.monotonic()
    with subprocess.Popen(command(whole), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start_seconds = time.monotonic() - begun
        process.stdout.read()
    assert process.returncode == 0
    moments = random.Random(0)
    journal, lines = killed / "run.journal", [0]
    for number in range(20):
        with subprocess.Popen(command(killed), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if number % 4 == 3:  # while it starts, reads the journal and compiles
                time.sleep(moments.uniform(0, start_seconds))
            else:
                for _ in range(moments.randint(1, 6)):
                    process.stdout.readline()
                time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        lines.append(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
    assert lines == sorted(lines), "entries were lost"
    assert len(set(lines)) > 10
    assert lines[-1] <= CALLS, "the last run was not killed"
    subprocess.run(command(killed), check=True, capture_output=True)
    assert (killed / "run.output").read_bytes() == (whole / "run.output").read_bytes()
    assert journal.read_bytes() == (whole / "run.journal").read_bytes()
