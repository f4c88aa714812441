"""Targets and policies on made-up measurements, where everything can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

import compiled_sparse as cs
from compiled_sparse.calibration import CallKey
from compiled_sparse.calibration import Measurements
from compiled_sparse.calibration import SiteErrors
from compiled_sparse.calibration import fit
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import CalibrationError
from compiled_sparse.policy import Policy
from compiled_sparse.windows import WindowTable

GRID, TILE = (4, 8, 8), (2, 4, 4)
WINDOWS = (
    cs.STA(window_thw=(1, 1, 1), tile_thw=TILE),
    cs.STA(window_thw=(1, 2, 1), tile_thw=TILE),
)
SPARSITIES = (cs.VSA(sparsity=0.9), cs.VSA(sparsity=0.5))


def site(path: str, squares: list[list[float]], **changes: Any) -> SiteErrors:
    """An attention call with these relative squared errors by candidate and head."""
    same = tuple(tuple(0.5 for _ in row) for row in squares)
    given = {
        "path": path,
        "kind": "self",
        "grid_thw": GRID,
        "text": (0, 0),
        "head_dim": 8,
        "densities": (0.1, 0.4),
        "tiles": (TILE, TILE),
        "squared_dense": tuple(2.0 for _ in squares[0]),
        "squared_error": tuple(tuple(2.0 * value for value in row) for row in squares),
        "absolute_error": same,
        "cosine": same,
        "captured_mass": same,
    }
    return SiteErrors(**{**given, **changes})


def measurements(
    candidates: tuple[MechanismConfig, ...], *steps: tuple[SiteErrors, ...]
) -> Measurements:
    calls = {CallKey(step=number): sites for number, sites in enumerate(steps)}
    return Measurements(candidates=candidates, calls=calls)


ONE = {"densities": (0.1,), "tiles": (TILE,)}
EASY, HARD = [[0.01, 0.02], [0.0, 0.01]], [[0.5, 0.9], [0.04, 0.3]]


def test_the_error_target_is_a_root_mean_square_over_all_places() -> None:
    found = fit(measurements(WINDOWS, (site("a", EASY), site("b", HARD))), max_error=0.2)
    # Prices by place: taking each at its cheapest, while the mean square stays within 0.04.
    ((_, config),) = found.policy.rules
    assert isinstance(config, cs.STA)
    table = config.window_thw
    assert isinstance(table, WindowTable)
    narrow, wide, full = (1, 1, 1), (1, 2, 1), (2, 2, 2)
    assert table.row(0, 0) == (narrow, narrow)
    assert table.row(0, 1) == (wide, full)
    squares = [0.01, 0.02, 0.04, 0.0]
    assert found.relative_error == pytest.approx((sum(squares) / 4) ** 0.5)
    assert found.density == pytest.approx((0.1 + 0.1 + 0.4 + 1) / 4)
    # As reports say it of a table: its dense heads are in the kernel, too.
    assert found.predicted_gain == pytest.approx(0.8 / found.density)
    assert found.usage == {"dense": 1, WINDOWS[0].describe(): 2, WINDOWS[1].describe(): 1}


def test_other_mechanisms_become_rules_for_paths() -> None:
    found = fit(measurements(SPARSITIES, (site("a", EASY), site("b", HARD))), max_error=0.1)
    assert found.policy == Policy({"a": SPARSITIES[0], "b": "dense", "*": "dense"})
    assert found.relative_error == pytest.approx((0.015 / 2) ** 0.5)


def test_the_curve_goes_from_dense_to_the_fastest() -> None:
    found = fit(measurements(WINDOWS, (site("a", EASY),)), max_error=0.0)
    gains, errors = zip(*found.curve, strict=True)
    assert (gains[0], errors[0]) == (1.0, 0.0)
    assert list(gains) == sorted(gains)
    assert list(errors) == sorted(errors)
    assert gains[-1] == pytest.approx(8.0)


def test_a_step_that_nobody_measured_stays_dense() -> None:
    calls = {CallKey(step=step): (site("a", EASY),) for step in (0, 2)}
    found = fit(Measurements(candidates=WINDOWS, calls=calls), max_error=1.0)
    ((_, config),) = found.policy.rules
    assert isinstance(config, cs.STA)
    assert isinstance(config.window_thw, WindowTable)
    assert config.window_thw.row(1, 0) == ((2, 2, 2),) * 2
    assert config.window_thw.row(2, 0) == ((1, 1, 1),) * 2


def test_layers_that_were_not_measured_have_dense_rows() -> None:
    sites = tuple(site(f"{i}", EASY, layer=i, num_layers=3) for i in (0, 2))
    ((_, config),) = fit(measurements(WINDOWS, sites), max_error=1.0).policy.rules
    assert isinstance(config, cs.STA)
    table = config.window_thw
    assert isinstance(table, WindowTable)
    narrow, full = ((1, 1, 1),) * 2, ((2, 2, 2),) * 2
    assert [table.row(0, layer) for layer in range(table.num_layers)] == [narrow, full, narrow]


def test_a_table_with_too_few_sparse_heads_does_not_pay_and_is_dense() -> None:
    one_easy = [[0.01, 0.9, 0.9, 0.9, 0.9, 0.9], [0.0, 0.9, 0.9, 0.9, 0.9, 0.9]]
    found = fit(measurements(WINDOWS, (site("a", one_easy),)), max_error=0.1)
    assert found.policy == Policy({"*": "dense"})
    assert (found.density, found.relative_error, found.predicted_gain) == (1.0, 0.0, 1.0)


def test_steps_that_a_candidate_keeps_dense_itself_count_as_dense() -> None:
    late = cs.VMoBA(first_full_step=1)
    two_steps = measurements((late,), *((site("a", [[0.04]], **ONE),),) * 2)
    found = fit(two_steps, max_error=1.0)
    assert found.usage[late.describe()] == 1
    assert found.relative_error == pytest.approx((0.04 / 2) ** 0.5)
    assert found.density == pytest.approx((1 + 0.1) / 2)
    assert found.predicted_gain == pytest.approx(2 / (1 + 0.125))
    with pytest.raises(CalibrationError, match="at most"):
        fit(two_steps, min_gain=2.0)


@pytest.mark.parametrize("candidates", [WINDOWS, SPARSITIES], ids=["windows", "sparsities"])
def test_where_all_steps_stay_dense_nothing_is_promised(candidates: Any) -> None:
    found = fit(measurements(candidates, (site("a", EASY),)), max_error=1.0, dense_first_steps=5)
    assert (found.density, found.relative_error, found.predicted_gain) == (1.0, 0.0, 1.0)


def test_nothing_sparse_is_a_dense_policy() -> None:
    found = fit(measurements(WINDOWS, (site("a", HARD),)), max_error=0.0)
    assert found.policy == Policy({"*": "dense"})


def test_a_gain_out_of_reach_is_an_error_that_names_the_largest() -> None:
    with pytest.raises(CalibrationError, match="at most 8"):
        fit(measurements(WINDOWS, (site("a", EASY),)), min_gain=9.0)
    two_steps = measurements(WINDOWS, *((site("a", EASY),),) * 2)
    with pytest.raises(CalibrationError, match=r"at most 1\.78"):
        fit(two_steps, min_gain=2.0, dense_first_steps=1)


@pytest.mark.parametrize(
    "target",
    [{}, {"max_error": 0.1, "min_gain": 2.0}, {"max_error": -0.1}, {"min_gain": 0.5}],
    ids=["none", "both", "negative", "slower"],
)
def test_there_is_one_target(target: dict[str, float]) -> None:
    with pytest.raises(CalibrationError, match="fitted to one target"):
        fit(measurements(WINDOWS, (site("a", EASY),)), **target)


def test_dense_first_steps_is_a_count() -> None:
    with pytest.raises(CalibrationError, match="dense_first_steps"):
        fit(measurements(WINDOWS, (site("a", EASY),)), max_error=0.1, dense_first_steps=-1)


def test_windows_of_several_tiles_or_heads_cannot_stand_in_one_table() -> None:
    other = site("a", EASY, tiles=(TILE, (2, 2, 2)))
    with pytest.raises(CalibrationError, match="cannot stand in one table"):
        fit(measurements(WINDOWS, (other,)), max_error=1.0)
    fewer = site("b", [row[:1] for row in EASY])
    with pytest.raises(CalibrationError, match="different numbers of heads"):
        measurements(WINDOWS, (site("a", EASY), fewer))


def test_two_calls_of_one_module_cannot_be_told_apart() -> None:
    with pytest.raises(CalibrationError, match="told apart by their module path"):
        fit(measurements(SPARSITIES, (site("a", EASY), site("a", HARD))), max_error=0.1)
