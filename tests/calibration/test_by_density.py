"""Measurements summed up by density and layer, against sums by hand, and their picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from messages import Case
from messages import assert_wording
from test_fit import EASY
from test_fit import HARD
from test_fit import SPARSITIES
from test_fit import TILE
from test_fit import WINDOWS
from test_fit import measurements
from test_fit import site

import compiled_sparse as cs
from compiled_sparse.calibration import errors_by_density
from compiled_sparse.calibration import fit
from compiled_sparse.errors import CalibrationError
from compiled_sparse.plots import plot_errors
from compiled_sparse.plots.errors_drawing import draw_errors
from compiled_sparse.registry import KERNEL_EFFICIENCY

SITES = (site("a", EASY), site("b", HARD, densities=(0.2, 0.4)))


def test_errors_are_root_mean_squares_and_densities_means() -> None:
    found = errors_by_density(measurements(WINDOWS, SITES, SITES))
    assert (found.layers, found.num_steps, found.num_heads) == (("a", "b"), 2, 2)
    narrow, wide = found.candidates
    assert narrow.spec == WINDOWS[0].describe()
    assert narrow.density == pytest.approx(0.15)
    assert wide.density == pytest.approx(0.4)
    assert narrow.relative_error == pytest.approx(math.sqrt((0.01 + 0.02 + 0.5 + 0.9) / 4))
    assert narrow.by_layer == pytest.approx([math.sqrt(0.015), math.sqrt(0.7)])
    assert wide.by_layer == pytest.approx([math.sqrt(0.005), math.sqrt(0.17)])


@pytest.mark.parametrize("candidates", [WINDOWS, SPARSITIES], ids=["windows", "sparsities"])
def test_the_curve_is_that_of_the_fit_and_ends_at_the_fastest_candidate(
    candidates: tuple[cs.STA | cs.VSA, ...],
) -> None:
    measured = measurements(candidates, SITES)
    found = errors_by_density(measured)
    assert found.curve == fit(measured, max_error=0.0).curve
    assert found.no_curve == ""
    assert found.curve[0] == (1.0, 0.0)
    fastest = found.candidates[0]
    gain, error = found.curve[-1]
    # Where a candidate is taken everywhere the curve meets its point.
    assert KERNEL_EFFICIENCY / gain == pytest.approx(fastest.density)
    assert error == pytest.approx(fastest.relative_error)


def test_candidates_that_no_policy_can_hold_have_points_and_no_curve() -> None:
    tiles = (TILE, (4, 4, 4))
    mixed = (WINDOWS[0], cs.STA(window_thw=(1, 1, 1), tile_thw=tiles[1]))
    found = errors_by_density(measurements(mixed, (site("a", EASY, tiles=tiles),)))
    assert len(found.candidates) == 2
    assert found.curve == ()
    assert found.no_curve == "windows of these candidates cannot stand in one table"
    left, right = draw_errors(found).axes
    assert not left.lines
    assert left.get_title() == f"No fitted curve: {found.no_curve}"
    assert len(right.lines) == 2


def test_points_curve_and_layers_are_drawn() -> None:
    found = errors_by_density(measurements(WINDOWS, SITES))
    figure = draw_errors(found)
    left, right = figure.axes
    points = [tuple(each.get_offsets()[0]) for each in left.collections]
    assert points == [(each.density, each.relative_error) for each in found.candidates]
    (curve,) = left.lines
    assert list(curve.get_xdata()) == [KERNEL_EFFICIENCY / gain for gain, _ in found.curve]
    assert list(curve.get_ydata()) == [error for _, error in found.curve]
    assert [tuple(line.get_ydata()) for line in right.lines] == [
        each.by_layer for each in found.candidates
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{number}  {each.spec}, density {each.density:.3f}"
        for number, each in enumerate(found.candidates, 1)
    ]
    assert "over 1 step, 2 layers, 2 heads" in figure.get_suptitle()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_written(suffix: str, tmp_path: Path) -> None:
    found = errors_by_density(measurements(SPARSITIES, (site("a", EASY),)))
    path = plot_errors(found, path=tmp_path / f"errors{suffix}")
    assert path == tmp_path / f"errors{suffix}"
    assert path.stat().st_size > 3000


def test_a_head_without_an_output_has_no_relative_error() -> None:
    silent = site("a", EASY, squared_dense=(0.0, 1.0))
    assert_wording(
        Case(
            CalibrationError,
            "a relative error is not finite",
            "whose dense output is zero",
            "other than zero",
            "inputs that reach every head",
            lambda: errors_by_density(measurements(WINDOWS, (silent,))),
        )
    )
