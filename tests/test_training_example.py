"""The training example: its data, its loss, and a short run from the first step to the plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("importable_examples")


def test_a_seed_gives_the_same_videos_and_another_one_others() -> None:
    from moving_shapes import _data

    first, again, other = (next(_data.batches(3, seed)) for seed in (0, 0, 1))
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.time, again.time)
    assert not torch.equal(first.clean, other.clean)
    shape = (3, _data.CHANNELS, _data.FRAMES, _data.HEIGHT, _data.WIDTH)
    assert first.clean.shape == first.noise.shape == shape


def test_shapes_stay_inside_the_picture_and_bounce_off_its_walls() -> None:
    from moving_shapes import _data

    radius = torch.tensor([[2.0]])
    start = torch.tensor([[[0.5, 0.0]]])
    velocity = torch.tensor([[[9.0, -4.0]]])
    rows, columns = _data._bounced(start, velocity, radius)[0, 0].T
    # From the middle of rows 2 to 23 by 9 a frame, rounded to whole patches: 12.5, 21.5, 15.5, ...
    assert rows.tolist() == [12.0, 22.0, 16.0, 6.0, 6.0, 16.0]
    # From column 2 by 4, away from the wall.
    assert columns.tolist() == [2.0, 6.0, 10.0, 14.0, 18.0, 22.0]


def test_a_surface_moves_with_its_shape() -> None:
    from moving_shapes import _data

    picture = torch.rand(1, _data.CHANNELS, 13, 13)
    centres = torch.tensor([[[8.0, 8.0], [10.0, 6.0]] * 3])
    surface = _data._surface(*_data._distances(centres), picture)
    assert torch.equal(surface[:, :, 0, 6:12, 6:12], surface[:, :, 1, 8:14, 4:10])
    assert torch.equal(surface[:, :, 0, 2:15, 2:15], picture)


def test_held_out_times_are_spread_evenly() -> None:
    from moving_shapes import _data

    times = torch.cat([batch.time for batch in _data.held_out(2, 4, seed=0)])
    assert torch.allclose(times.sort().values, (torch.arange(8) + 0.5) / 8)


def test_the_flow_loss_is_that_of_the_velocity_in_all_frames_but_the_given_one() -> None:
    from moving_shapes import _data
    from moving_shapes import _training

    batch = next(_data.batches(2, 0))

    def exact(video: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        noisy, given = video[:, :-1], video[:, -1:]
        assert torch.equal(noisy[:, :, 0], batch.clean[:, :, 0])
        assert given[:, :, 0].eq(1).all()
        assert given[:, :, 1:].eq(0).all()
        share = time.view(-1, 1, 1, 1, 1)
        expected = (1 - share) * batch.clean + share * batch.noise
        assert torch.allclose(noisy[:, :, 1:], expected[:, :, 1:], atol=1e-6)
        velocity = batch.noise - batch.clean
        velocity[:, :, 0] = 100.0  # nobody looks at it
        return velocity

    assert _training.flow_loss(exact, batch) == 0


@pytest.mark.slow
def test_a_short_run_saves_reloads_and_plots_with_one_compilation(
    tmp_path: Path, fresh_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_moving_shapes

    results: Any = train_moving_shapes.main(["--quick", "--out", str(tmp_path)])
    losses = (results.dense_before, results.dense, results.zero_shot, results.sparse)
    assert all(math.isfinite(loss) and loss < results.trivial for loss in losses)
    assert results.compilations == 1
    assert results.reloaded == pytest.approx(results.sparse, abs=1e-6)
    files = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 0}
    checkpoints = {f"{name}.safetensors" for name in ("dense", "dense_finetuned", "vsa")}
    assert files == {*checkpoints, "losses.png", "results.json"}
    recorded = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert recorded["sparse"] == results.sparse
    assert "VSA, fine-tuned" in capsys.readouterr().out
