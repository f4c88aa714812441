"""Heads of known structure: the right window is found for each, and pays off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from structured import EVERYTHING
from structured import GRID
from structured import TILE
from structured import structured_model
from structured import structured_video
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse.calibration import Call
from compiled_sparse.calibration import CallKey
from compiled_sparse.calibration import Measurements
from compiled_sparse.policy import Policy
from compiled_sparse.windows import WindowTable

HEADS = (("T", "H", "W", EVERYTHING), ("W", EVERYTHING, "T", "H"))
WINDOWS = {"T": (1, 4, 4), "H": (4, 1, 4), "W": (4, 4, 1)}
CANDIDATES = tuple(cs.STA(window_thw=window, tile_thw=TILE) for window in WINDOWS.values())
STEPS = 3


@pytest.fixture(scope="module")
def model() -> Any:
    torch._dynamo.reset()
    return structured_model(HEADS)


@pytest.fixture(scope="module")
def measured(model: Any) -> Measurements:
    calls = [
        Call(args=(structured_video(seed),), key=CallKey(sample=f"clip {seed}", step=step))
        for seed in (1, 2)
        for step in range(STEPS)
    ]
    return calibration.measure(model, calls, CANDIDATES, inner="eager")


def output_error(model: Any, policy: Any) -> float:
    """Relative error of the model's output on a video that nothing was measured on."""
    torch._dynamo.reset()
    video = structured_video(9)
    options = {"policy": policy, "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="compiled_sparse", options=options)
    with torch.no_grad(), cs.metadata(step=STEPS - 1, num_steps=STEPS):
        actual: Tensor = compiled(video)
        expected: Tensor = model(video)
    return float((actual - expected).norm() / expected.norm())


def windows_of(table: WindowTable, step: int) -> list[tuple[tuple[int, ...], ...]]:
    return [table.row(step, layer) for layer in range(len(HEADS))]


def test_search_and_tune_find_the_window_of_every_head(
    measured: Measurements, model: Any, tmp_path: Path
) -> None:
    for (sample, branch), search in calibration.mask_searches(measured).items():
        assert branch == "positive"
        search.save(tmp_path, sample)
    full = calibration.full_window_of(measured)
    assert full == (4, 4, 4)
    strategy = calibration.tune(tmp_path, full_window=full, dense_first_steps=1)
    table = strategy.to_table()
    assert windows_of(table, 0) == [(full,) * 4] * 2
    for step in range(1, STEPS):
        for layer, row in enumerate(windows_of(table, step)):
            for axis, window in zip(HEADS[layer], row, strict=True):
                assert axis == EVERYTHING or window == WINDOWS[axis]
    tuned = output_error(model, cs.STA(window_thw=table, tile_thw=TILE))
    uniform = [output_error(model, candidate) for candidate in CANDIDATES]
    # The last steps of both have the same density: one window of four tiles on one axis each.
    assert tuned < 0.5 * min(uniform)


def test_fit_keeps_the_heads_dense_that_need_everything(measured: Measurements, model: Any) -> None:
    found = calibration.fit(measured, max_error=0.001)
    ((_, config),) = found.policy.rules
    assert isinstance(config, cs.STA)
    assert isinstance(config.window_thw, WindowTable)
    for layer, row in enumerate(windows_of(config.window_thw, 0)):
        assert row == tuple(WINDOWS.get(axis, (4, 4, 4)) for axis in HEADS[layer])
    assert found.density == pytest.approx((6 * 0.25 + 2) / 8)
    assert found.usage["dense"] == 2 * STEPS
    assert output_error(model, found.policy) < 1e-5


def test_a_fitted_policy_is_better_than_any_uniform_one_of_its_density(
    measured: Measurements, model: Any
) -> None:
    found = calibration.fit(measured, min_gain=3.2)
    assert found.density == pytest.approx(0.25)
    uniform = [output_error(model, candidate) for candidate in CANDIDATES]
    assert output_error(model, found.policy) < 0.5 * min(uniform)


def test_the_measured_error_is_that_of_the_policy(measured: Measurements) -> None:
    """Recomputed from the measurements, window by window."""
    found = calibration.fit(measured, min_gain=3.2)
    ((_, config),) = found.policy.rules
    assert isinstance(config, cs.STA)
    assert isinstance(config.window_thw, WindowTable)
    index = {window: i for i, window in enumerate(WINDOWS.values())}
    errors = measured.mean("relative_squared_error")
    squares = [
        float(errors[step, layer, index[window], head])
        for step in range(STEPS)
        for layer, row in enumerate(windows_of(config.window_thw, step))
        for head, window in enumerate(row)
    ]
    assert found.relative_error == pytest.approx((sum(squares) / len(squares)) ** 0.5)


def test_dense_first_steps_are_dense_and_count(measured: Measurements) -> None:
    found = calibration.fit(measured, max_error=1.0, dense_first_steps=1)
    assert found.policy.dense_first_steps == 1
    assert found.density == pytest.approx((1 + 2 * 0.25) / 3)
    whole = calibration.fit(measured, max_error=1.0, dense_first_steps=STEPS)
    assert whole.policy == Policy({"*": "dense"})
    assert (whole.density, whole.relative_error, whole.predicted_gain) == (1.0, 0.0, 1.0)


def test_other_mechanisms_are_chosen_by_layer(model: Any) -> None:
    candidates = ["vsa:sparsity=0.5,tile_thw=2x2x2", "vsa:sparsity=0.9,tile_thw=2x2x2"]
    call = Call(args=(structured_video(1),), key=CallKey())
    measured = calibration.measure(model, [call], candidates, inner="eager")
    errors = measured.mean("relative_squared_error")
    assert errors.shape == (1, 2, 2, 4)
    assert bool((errors[:, :, 0] <= errors[:, :, 1] + 1e-12).all())
    found = calibration.fit(measured, min_gain=1.2)
    globs = [glob for glob, _ in found.policy.rules]
    assert globs == ["blocks.0", "blocks.1", "*"]
    assert Policy.from_json(found.policy.to_json()) == found.policy
    assert output_error(model, found.policy) > 0


def test_the_grid_of_the_model_is_the_one_measured(measured: Measurements) -> None:
    assert {site.grid_thw for site in measured.layers} == {GRID}
    assert measured.steps == (0, 1, 2)
