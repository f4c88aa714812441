"""The examples of several processes, as torchrun runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.slow


def printed(example: str, num_processes: int, *words: str) -> str:
    """Run an example; return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(num_processes), str(EXAMPLES / example)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--inner", "aot_eager", *words],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stay dense" not in done.stderr
    return done.stdout


def run(num_processes: int, *words: str) -> list[float]:
    """Train; return the losses that the first process printed."""
    said = printed("train_sharded.py", num_processes, *words)
    return [float(each) for each in re.findall(r"loss (\d+\.\d+)", said)]


def test_four_processes_continue_what_two_began_as_one_would_have(tmp_path: Path) -> None:
    begun, ended, whole = (str(tmp_path / name) for name in ("begun", "ended", "whole"))
    losses = run(2, "--steps", "2", "--out", begun, "--parallel", "ddp")
    losses += run(4, "--steps", "2", "--load", begun, "--out", ended, "--parallel", "fsdp")
    expected = run(1, "--steps", "4", "--out", whole)
    assert len(set(expected)) == 4
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be shared evenly by 2 processes"):
        run(2, "--batch", "3", "--steps", "1", "--out", str(tmp_path / "none"))


@pytest.mark.parametrize(("num_processes", "ring"), [(3, ()), (2, ("--ring",))])
def test_a_divided_video_is_what_one_process_makes_of_it(
    num_processes: int, ring: tuple[str, ...]
) -> None:
    policy = ("--policy", "sta:window_thw=3x1x3,tile_thw=4x4x4")
    said = printed("divided_video.py", num_processes, *policy, *ring)
    (error,) = re.findall(r"2 of 2 attention calls sparse.* relative error (\S+)", said)
    assert float(error) < 1e-5
