"""Choosing one alternative for each of many places: as little error as possible for the time saved.

Each place has alternatives with a cost and an error; dense attention, of cost 1 and error 0, is one
of them. Along the lower convex hull of a place, each further step saves time at a growing price.
Taking the cheapest steps of all places first is optimal at every total it passes through.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

DENSE = -1


@dataclass(frozen=True)
class Place:
    """The alternatives of one place beside dense attention.

    Args:
        costs: Time of each alternative, dense attention's is 1.
        errors: Squared error of each, dense attention's is 0.
    """

    costs: Sequence[float]
    errors: Sequence[float]

    def hull(self) -> list[int]:
        """Return the alternatives worth choosing, from dense attention to the fastest.

        Costs fall, errors grow, and each step costs more error per time saved than the one before.
        """
        hull = [DENSE]
        order = sorted(range(len(self.costs)), key=lambda i: (-self.costs[i], self.errors[i], i))
        for index in order:
            if self.cost(index) >= self.cost(hull[0]):
                continue  # as slow as dense attention
            while len(hull) > 1 and not self._is_convex(hull[-2], hull[-1], index):
                hull.pop()
            if self.cost(index) < self.cost(hull[-1]):
                hull.append(index)
        return hull

    def cost(self, index: int) -> float:
        """Return the cost of an alternative."""
        return 1.0 if index == DENSE else self.costs[index]

    def error(self, index: int) -> float:
        """Return the squared error of an alternative."""
        return 0.0 if index == DENSE else self.errors[index]

    def price(self, before: int, after: int) -> float:
        """Return the squared error that a step adds per time it saves."""
        saved = self.cost(before) - self.cost(after)
        added = self.error(after) - self.error(before)
        return added / saved if saved > 0 else float("inf")

    def _is_convex(self, first: int, second: int, third: int) -> bool:
        return self.price(first, second) < self.price(second, third)


@dataclass(frozen=True)
class Point:
    """The totals after a step.

    Args:
        cost: Mean cost over all places.
        error: Mean squared error over all places.
    """

    cost: float
    error: float


@dataclass(frozen=True)
class Choices:
    """What was chosen.

    Args:
        chosen: For each place the index of an alternative, or `DENSE`.
        curve: The totals after each step taken and each that could follow, dense first.
        taken: How many points of the curve lie up to what was chosen.
    """

    chosen: tuple[int, ...]
    curve: tuple[Point, ...]
    taken: int


def choose(
    places: Sequence[Place], *, max_error: float | None = None, max_cost: float | None = None
) -> Choices:
    """Take the cheapest steps until a limit is met.

    Args:
        places: The places.
        max_error: Steps are taken while the mean squared error stays within this.
        max_cost: Steps are taken until the mean cost is within this.

    Returns:
        The choices. With `max_cost` the last point may still be above it, where nothing faster is
        left.
    """
    hulls = [place.hull() for place in places]
    at = [0] * len(places)
    waiting = [
        (place.price(*hull[:2]), number)
        for number, (place, hull) in enumerate(zip(places, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(waiting)
    point = Point(1.0, 0.0)
    curve, chosen, taken = [point], None, 1
    while waiting:
        _, number = heapq.heappop(waiting)
        place, hull = places[number], hulls[number]
        before, after = hull[at[number]], hull[at[number] + 1]
        following = Point(
            point.cost + (place.cost(after) - place.cost(before)) / len(places),
            point.error + (place.error(after) - place.error(before)) / len(places),
        )
        if chosen is None and _is_enough(point, following, max_error, max_cost):
            chosen, taken = _chosen(hulls, at), len(curve)
        point = following
        curve.append(point)
        at[number] += 1
        if at[number] + 1 < len(hull):
            heapq.heappush(waiting, (place.price(*hull[at[number] : at[number] + 2]), number))
    if chosen is None:
        chosen, taken = _chosen(hulls, at), len(curve)
    return Choices(chosen, tuple(curve), taken)


def _is_enough(
    point: Point, following: Point, max_error: float | None, max_cost: float | None
) -> bool:
    too_far = max_error is not None and following.error > max_error
    return too_far or (max_cost is not None and point.cost <= max_cost)


def _chosen(hulls: list[list[int]], at: list[int]) -> tuple[int, ...]:
    return tuple(hull[position] for hull, position in zip(hulls, at, strict=True))
