"""The choice among alternatives: never worse than any other choice of the same cost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_sparse.calibration.frontier import DENSE
from compiled_sparse.calibration.frontier import Place
from compiled_sparse.calibration.frontier import choose

PLACES = st.lists(
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
).map(lambda rows: [Place([c / 10 for c, _ in row], [float(e) for _, e in row]) for row in rows])


def totals(places: list[Place], chosen: tuple[int, ...]) -> tuple[float, float]:
    pairs = list(zip(places, chosen, strict=True))
    cost = sum(place.cost(i) for place, i in pairs) / len(places)
    return cost, sum(place.error(i) for place, i in pairs) / len(places)


@given(PLACES)
def test_every_point_of_the_curve_is_best_at_its_cost(places: list[Place]) -> None:
    options = [(DENSE, *range(len(place.costs))) for place in places]
    every = [totals(places, chosen) for chosen in itertools.product(*options)]
    curve = choose(places, max_error=1e9).curve
    assert (curve[0].cost, curve[0].error) == (1.0, 0.0)
    for point in curve:
        best = min(error for cost, error in every if cost <= point.cost + 1e-9)
        assert point.error <= best + 1e-6


@given(PLACES, st.integers(0, 30))
def test_the_error_stays_within_its_limit_and_the_next_step_would_not(
    places: list[Place], limit: int
) -> None:
    found = choose(places, max_error=float(limit))
    cost, error = totals(places, found.chosen)
    reached = found.curve[found.taken - 1]
    assert (cost, error) == (pytest.approx(reached.cost), pytest.approx(reached.error))
    assert error <= limit + 1e-9
    if found.taken < len(found.curve):
        assert found.curve[found.taken].error > limit


@given(PLACES, st.floats(0.05, 1.0))
def test_no_step_more_is_taken_than_the_cost_asks_for(places: list[Place], limit: float) -> None:
    found = choose(places, max_cost=limit)
    cost, _ = totals(places, found.chosen)
    assert cost <= limit + 1e-9 or found.taken == len(found.curve)
    if found.taken > 1:
        assert found.curve[found.taken - 2].cost > limit


def test_an_alternative_that_is_slower_and_worse_is_never_chosen() -> None:
    place = Place([0.5, 0.6, 0.2], [1.0, 2.0, 9.0])
    assert place.hull() == [DENSE, 0, 2]


def test_a_step_that_costs_more_than_the_one_behind_it_is_skipped() -> None:
    place = Place([0.8, 0.4], [5.0, 6.0])
    assert place.hull() == [DENSE, 1]


def test_of_equal_alternatives_the_first_is_chosen() -> None:
    assert Place([0.5, 0.5], [1.0, 1.0]).hull() == [DENSE, 0]
    assert Place([1.0], [0.0]).hull() == [DENSE]
