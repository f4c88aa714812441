"""Real models under a calibration: their output is their own, and what is measured is right."""

from __future__ import annotations

import harness
import pytest
import torch
from builders import BUILDERS

import compiled_sparse as cs
from compiled_sparse import calibration

pytestmark = pytest.mark.usefixtures("fresh_compiler")

FAST = ("wan", "cogvideox 5b")
SLOW = ("hunyuan video", "ltx", "allegro", "cosmos", "motif video", "qwen image")


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((name, 1) for name in FAST),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_a_whole_window_measures_no_error_and_a_narrow_one_what_it_leaves_out(
    name: str, batch: int
) -> None:
    builder = BUILDERS[name]
    axes = len(builder.grid)
    candidates = [harness.narrow(axes), harness.spanning(axes)]
    case = harness.build(builder, batch=batch)
    expected = harness.outputs(case)

    with (
        calibration.recording(case.model, candidates, inner="eager") as found,
        cs.metadata(step=0),
    ):
        actual = harness.outputs(case)
    assert torch.equal(actual, expected)
    measured = found.measurements
    truths = [t for t in harness.truths(builder, batch=batch) if t.kind == "video"]
    assert len(measured.layers) == len(truths)
    for site, truth in zip(measured.layers, truths, strict=True):
        assert (site.grid_thw, site.text) == (tuple(builder.grid), (truth.before, truth.after))
    errors = measured.mean("relative_squared_error").sqrt()
    assert float(errors[:, :, 1].max()) < 1e-5
    assert float(errors[:, :, 0].min()) > 1e-2
    mass = measured.mean("captured_mass")
    torch.testing.assert_close(mass[:, :, 1], torch.ones_like(mass[:, :, 1]), atol=1e-5, rtol=0)
    assert float(mass[:, :, 0].max()) < 0.9
    assert measured.steps == (0,)
