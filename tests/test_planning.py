"""Plans: decided as the backend decides, and predictions that follow from what they are made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse import registry
from compiled_sparse.chips import CHIPS
from compiled_sparse.chips import chip
from compiled_sparse.config import MechanismConfig
from compiled_sparse.geometry import whole_gain
from compiled_sparse.planning import Plan
from compiled_sparse.planning import PlanRequest
from compiled_sparse.planning import PlanRow
from compiled_sparse.planning import plan
from compiled_sparse.preset_policy import preset_policy
from compiled_sparse.presets import MODELS
from compiled_sparse.presets import geometry
from compiled_sparse.selector import Chosen
from compiled_sparse.selector import choose

WAN = geometry("wan2.1-t2v-14b")
REQUEST = PlanRequest(
    grid_thw=WAN.grid_thw(),
    heads=WAN.heads,
    head_dim=WAN.head_dim,
    layers=WAN.layers,
    model=WAN,
    chip=chip("h100"),
)


def only_row(answer: Plan) -> PlanRow:
    (row,) = answer.rows
    return row


def planned(config: MechanismConfig, **changes: object) -> PlanRow:
    return only_row(plan(dataclasses.replace(REQUEST, configs=(config,), **changes)))


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"ltx-video"}))
def test_there_is_a_row_for_every_mechanism_at_about_a_tenth_of_the_work(name: str) -> None:
    model = MODELS[name]
    request = PlanRequest(
        grid_thw=model.grid_thw(), text=model.text, heads=model.heads, head_dim=model.head_dim
    )
    rows = {row.mechanism: row for row in plan(request).rows}
    assert set(rows) == {"auto", *(each.name for each in registry.mechanisms())}
    assert all(row.fits for row in rows.values() if row.mechanism != "auto")
    densities = {name: row.density for name, row in rows.items() if name != "auto"}
    text = (model.text.before + model.text.after) / request.num_tokens
    assert all(0.08 < (each or 0.0) < 0.13 + 2 * text for each in densities.values()), densities
    assert rows["auto"].fits


def test_on_a_small_grid_no_window_is_less_than_a_tile_with_its_neighbours() -> None:
    grid = geometry("ltx-video").grid_thw()
    rows = {
        row.mechanism: row for row in plan(PlanRequest(grid_thw=grid, heads=1, head_dim=64)).rows
    }
    assert rows["sta"].spec == "sta:window_thw=3x3x3,tile_thw=4x4x4"
    assert rows["auto"].reason == "no_gain"


@pytest.mark.parametrize("config", [cs.STA(), cs.VSA(), cs.SLA()], ids=lambda each: each.name)
def test_a_row_says_what_the_backend_would_decide(config: MechanismConfig) -> None:
    row, decided = planned(config), choose(config, REQUEST.grid_thw, 0, 0, WAN.heads)
    assert isinstance(decided, Chosen)
    assert (row.density, row.tile) == (decided.density, decided.tile)
    assert row.gain == decided.predicted_gain


def test_dense_attention_takes_its_flops_at_the_rate_of_the_chip() -> None:
    # 183 ms a layer at 640 TFLOP/s is what tables of this shape say.
    answer = plan(REQUEST)
    assert answer.dense_milliseconds == pytest.approx(40 * 183 * 640 / (989.4 * 0.65), rel=0.01)
    slower = plan(dataclasses.replace(REQUEST, attention_tflops=100.0, batch=2))
    flops = 2 * WAN.attention_flops(WAN.grid_thw())
    assert slower.dense_milliseconds == pytest.approx(flops / 100e12 * 1e3)


def test_the_whole_gains_what_its_share_of_attention_allows() -> None:
    answer = plan(dataclasses.replace(REQUEST, configs=(cs.VSA(),)))
    row = only_row(answer)
    assert row.gain is not None
    assert row.milliseconds is not None
    assert row.milliseconds * row.gain == pytest.approx(answer.dense_milliseconds)
    assert answer.attention_share == pytest.approx(WAN.attention_share(WAN.grid_thw()))
    assert row.whole_gain == pytest.approx(whole_gain(answer.attention_share or 0.0, row.gain))
    assert 1 < (row.whole_gain or 0.0) < row.gain


def test_training_counts_the_backward_and_refuses_what_has_none() -> None:
    forward, training = plan(REQUEST), plan(dataclasses.replace(REQUEST, training=True))
    assert training.dense_milliseconds == pytest.approx(3.5 * (forward.dense_milliseconds or 0))
    assert (training.attention_share or 0.0) > (forward.attention_share or 0.0)
    assert planned(cs.SageSLA(), training=True).reason == "forward_only"
    trained, used = planned(cs.VSA(), training=True), planned(cs.VSA())
    assert (trained.gain or 0.0) < (used.gain or 0.0)


def test_a_mechanism_that_does_not_fit_is_a_row_with_its_reason() -> None:
    row = planned(cs.VSA(), dtype=torch.float64)
    assert (row.fits, row.reason, row.gain, row.milliseconds) == (
        False,
        "dtype_unsupported",
        None,
        None,
    )
    assert planned(cs.Auto()).reason == "device_unsupported"  # REQUEST is for a GPU
    assert planned(cs.STA(window_thw=(3, 3), tile_thw=(8, 8))).reason == "axes_mismatch"
    assert planned(cs.Dense()).reason == "policy_dense"


def test_padding_and_blocks_are_those_of_the_tile_with_text() -> None:
    row = planned(cs.VSA(), grid_thw=(21, 30, 52), model=None)
    assert (row.blocks, row.padding) == (624, pytest.approx(39936 / 32760 - 1))
    with_text = planned(cs.VSA(), grid_thw=(21, 30, 52), model=None, text=cs.Text(after=65))
    assert with_text.blocks == 626
    runs = planned(cs.SLA(), grid_thw=(21, 30, 52), model=None, text=cs.Text(after=65))
    assert runs.blocks == -(-(32760 + 65) // 128)
    assert planned(cs.SLA(), model=None).whole_gain is None


def test_without_a_chip_or_in_full_precision_there_are_ratios_only() -> None:
    assert planned(cs.VSA(), chip=None).milliseconds is None
    row = planned(cs.VSA(), dtype=torch.float32)
    assert row.fits
    assert row.milliseconds is None
    assert planned(cs.VSA(), chip=None, attention_tflops=0.1).milliseconds is not None


@pytest.mark.parametrize("name", ["heads", "head_dim", "layers", "batch"])
def test_a_count_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(errors.ShapeError, match=name):
        plan(dataclasses.replace(REQUEST, **{name: 0}))


def test_a_grid_of_two_axes_is_planned_with_the_mechanisms_that_take_it() -> None:
    request = PlanRequest(grid_thw=(64, 64), heads=24, head_dim=128, text=cs.Text(before=512))
    rows = {row.mechanism: row for row in plan(request).rows}
    assert rows["sta"].fits
    assert rows["vmoba"].reason == "axes_mismatch"


@pytest.mark.parametrize("name", MODELS)
def test_the_policy_of_a_preset_is_what_automatic_mode_would_take(name: str) -> None:
    model, policy = MODELS[name], preset_policy(name)
    ((glob, config),) = policy.rules
    grid, text = model.grid_thw(), model.text
    chosen = choose(cs.Auto(min_gain=0.0), grid, text.before, text.after, model.heads)
    assert glob == "*"
    assert isinstance(chosen, Chosen)
    assert config == chosen.config
    assert policy.dense_first_steps == cs.quality("balanced").dense_first_steps
    assert preset_policy(name, level="careful").dense_first_layers == 2


def test_the_policy_of_a_preset_follows_the_video() -> None:
    small, large = (
        preset_policy(WAN.name, frames=17, height=480, width=832),
        preset_policy(WAN.name),
    )
    assert small.rules != large.rules
    with pytest.raises(errors.LayoutError, match="frames"):
        preset_policy(WAN.name, frames=16)
    with pytest.raises(errors.ConfigError, match="quality level"):
        preset_policy(WAN.name, level="best")


def test_no_chip_is_said_to_reach_more_than_its_data_sheet() -> None:
    for each in CHIPS.values():
        assert 0.0 < each.attention_share < 1.0
        assert ("assumed" if each.assumed else "published") in each.describe()
