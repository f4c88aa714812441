"""From measurements to a policy: the sparsity goes where it costs least."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.calibration.frontier import DENSE
from compiled_sparse.calibration.frontier import Choices
from compiled_sparse.calibration.frontier import Place
from compiled_sparse.calibration.frontier import Point
from compiled_sparse.calibration.frontier import choose
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.config import STA
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import is_count
from compiled_sparse.errors import CalibrationError
from compiled_sparse.layout import tiles_along
from compiled_sparse.policy import Policy
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.windows import WindowTable


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A policy, and what the measurements say of it.

    Args:
        policy: The policy.
        relative_error: Root mean square over steps, layers and heads of the L2 error of attention
            relative to dense attention, as measured; dense steps and layers count as 0.
        density: Mean fraction of (query, key) pairs attended to.
        predicted_gain: Predicted speed-up of these attention calls over dense attention.
        curve: (predicted gain, relative error) from dense attention to the fastest choice of every
            place: what another target would have given.
        usage: How many places got each candidate; spec strings, "dense" among them.
    """

    policy: Policy
    relative_error: float
    density: float
    predicted_gain: float
    curve: tuple[tuple[float, float], ...]
    usage: dict[str, int]


def fit(
    measurements: Measurements,
    *,
    max_error: float | None = None,
    min_gain: float | None = None,
    dense_first_steps: int = 0,
) -> Fit:
    """Choose a candidate, or dense attention, for every place that was measured.

    Windows of sliding tile attention are chosen for each step, layer and head, and become a table
    of windows; other mechanisms for each layer, over all steps and heads, and become rules for
    module paths. Chosen is what saves most time for the error it adds, until the target is met. The
    time is predicted from the density, as in reports: in a table, heads with the full window take
    longer than dense attention does, so that a few sparse heads alone are not worth it. The error
    is what was measured.

    Args:
        measurements: What `measure` or `recording` returned.
        max_error: Largest relative error, as `Fit.relative_error` counts it, such as 0.1.
        min_gain: Smallest predicted speed-up of attention, such as 2.0, in place of `max_error`.
        dense_first_steps: Steps at the start that stay dense whatever was measured.

    Raises:
        CalibrationError: if not one of the targets is given or it is out of range, the gain cannot
            be reached with these candidates, or candidates cannot be put in one policy.
    """
    check_targets(max_error, min_gain, dense_first_steps)
    by_head = all(isinstance(config, STA) for config in measurements.candidates)
    errors = measurements.mean("relative_squared_error")
    free = [i for i, step in enumerate(measurements.steps) if step >= dense_first_steps]
    active = _active(measurements, free)
    places = _places(measurements, errors[free] * active[:, None, :, None], active, by_head=by_head)
    # Dense steps are places, too: they weigh in every mean, and have no alternative.
    share = len(free) / errors.shape[0]
    choices = choose(
        places,
        max_error=None if max_error is None else max_error**2 / share if share else 0.0,
        max_cost=None if min_gain is None else _max_cost(1 / min_gain, share, by_head=by_head),
    )
    gains = [1 / (1 - share + share * _time(p, by_head=by_head)) for p in choices.curve]
    if gains[choices.taken - 1] <= 1:  # a few sparse heads do not pay for the table
        choices = dataclasses.replace(choices, chosen=(DENSE,) * len(places), taken=1)
    reached, gain = choices.curve[choices.taken - 1], gains[choices.taken - 1]
    if min_gain is not None and gain < min_gain * (1 - 1e-9):
        raise CalibrationError(
            "these candidates cannot be as fast as that",
            got=f"min_gain={min_gain}",
            expected=f"at most {gain:.3g}, with the fastest candidate everywhere",
            next_step="measure sparser candidates, keep fewer steps dense, or lower min_gain",
        )
    make = _window_policy if by_head else _layer_policy
    return Fit(
        policy=make(measurements, choices, free, dense_first_steps),
        relative_error=math.sqrt(share * max(reached.error, 0.0)),
        density=1 - share + share * _density(measurements, choices, active, len(places)),
        predicted_gain=gain,
        curve=tuple(
            (gain, math.sqrt(share * max(point.error, 0.0)))
            for number, (gain, point) in enumerate(zip(gains, choices.curve, strict=True))
            if number == 0 or gain > 1
        ),
        usage=_usage(measurements, choices),
    )


def check_targets(max_error: Any, min_gain: Any, dense_first_steps: Any) -> None:
    """Check what `fit` is asked for, before anything is measured for it.

    Raises:
        CalibrationError: if not one of the targets is given, or a value is out of range.
    """
    in_range = (max_error is None or max_error >= 0) and (min_gain is None or min_gain >= 1)
    if (max_error is None) == (min_gain is None) or not in_range:
        raise CalibrationError(
            "a policy is fitted to one target",
            got=f"max_error={max_error!r}, min_gain={min_gain!r}",
            expected="max_error of at least 0, or min_gain of at least 1",
            next_step="pass max_error=0.1, for instance",
        )
    if not is_count(dense_first_steps, least=0):
        raise CalibrationError(
            "dense_first_steps is not a count",
            got=repr(dense_first_steps),
            expected="an integer of at least 0",
            next_step="pass dense_first_steps=0 to choose every step by its error",
        )


def _active(measurements: Measurements, free: list[int]) -> Tensor:
    """1 at the steps where a candidate is sparse, and 0 where its own schedule keeps it dense.

    Returns:
        float64 [free steps, candidates].
    """
    firsts = [config.dense_first_steps for config in measurements.candidates]
    rows = [[float(measurements.steps[i] >= first) for first in firsts] for i in free]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(free), len(firsts))


def _max_cost(wanted: float, share: float, *, by_head: bool) -> float:
    """Cost of the free steps at which all steps together take the time that is wanted."""
    rest = (wanted - (1 - share)) / share if share else 1.0
    return rest * KERNEL_EFFICIENCY if by_head and rest < 1 else rest


def _time(point: Point, *, by_head: bool) -> float:
    """Time of the free steps, in that of dense attention.

    Heads of a table share the kernel: its full window costs more than dense attention does.
    """
    is_table = by_head and point.cost < 1
    return point.cost / KERNEL_EFFICIENCY if is_table else point.cost


def _places(
    measurements: Measurements, errors: Tensor, active: Tensor, *, by_head: bool
) -> list[Place]:
    """Places in the order steps, layers, heads; or layers alone.

    Args:
        measurements: For the densities.
        errors: [steps, layers, candidates, heads].
        active: As from `_active`.
        by_head: Whether each step and head is a place; its costs are densities then.
    """
    if not len(errors):
        return []
    if not by_head:
        shares = active.mean(0).tolist()
        return [
            Place([_cost(*pair) for pair in zip(shares, site.densities, strict=True)], row)
            for site, row in zip(measurements.layers, errors.mean((0, 3)).tolist(), strict=True)
        ]
    return [
        Place(measurements.layers[layer].densities, row)
        for of_step in errors.transpose(2, 3).tolist()
        for layer, of_layer in enumerate(of_step)
        for row in of_layer
    ]


def _cost(share: float, density: float) -> float:
    """Cost of a candidate that is sparse at a share of the steps."""
    return 1 - share + share * min(1.0, density / KERNEL_EFFICIENCY)


def _density(measurements: Measurements, choices: Choices, active: Tensor, places: int) -> float:
    if not places:
        return 1.0
    shares: list[float] = active.mean(0).tolist()
    layers = measurements.layers
    group = layers[0].num_heads if places != len(layers) else 1
    left_out = sum(
        shares[index] * (1 - layers[number // group % len(layers)].densities[index])
        for number, index in enumerate(choices.chosen)
        if index != DENSE
    )
    return 1 - left_out / places


def _usage(measurements: Measurements, choices: Choices) -> dict[str, int]:
    names = {DENSE: "dense"} | {i: c.describe() for i, c in enumerate(measurements.candidates)}
    return {name: choices.chosen.count(index) for index, name in names.items()}


def _layer_policy(
    measurements: Measurements, choices: Choices, free: list[int], dense_first_steps: int
) -> Policy:
    rules: dict[str, MechanismConfig | str] = {}
    for number, site in enumerate(measurements.layers):
        index = choices.chosen[number] if choices.chosen else DENSE
        rule = "dense" if index == DENSE else measurements.candidates[index]
        if rules.setdefault(site.path, rule) != rule or not site.path:
            raise CalibrationError(
                "calls cannot be told apart by their module path",
                got=f"two calls of {site.path!r} with different choices",
                expected="each call in a module of its own",
                next_step="calibrate windows of STA, which are told apart by their layer's index",
            )
    return Policy({**rules, "*": "dense"}, dense_first_steps=dense_first_steps)


def _window_policy(
    measurements: Measurements, choices: Choices, free: list[int], dense_first_steps: int
) -> Policy:
    if not any(index != DENSE for index in choices.chosen):
        return Policy({"*": "dense"})
    windows, tile = _window_palette(measurements)
    heads, (numbers, num_layers) = measurements.layers[0].num_heads, _layer_numbers(measurements)
    dense = [len(windows) - 1] * heads
    table = [[dense for _ in range(num_layers)] for _ in range(measurements.num_steps)]
    chosen = iter(choices.chosen)
    for position in free:
        for layer in numbers:
            row = [next(chosen) for _ in range(heads)]
            table[measurements.steps[position]][layer] = [i % len(windows) for i in row]
    is_same = all(rows == table[-1] for rows in table[dense_first_steps:])
    choice = [table[-1]] if is_same else table
    config = STA(window_thw=WindowTable(windows=windows, choice=choice), tile_thw=tile)  # type: ignore[arg-type]
    return Policy({"*": config}, dense_first_steps=dense_first_steps)


def _layer_numbers(measurements: Measurements) -> tuple[list[int], int]:
    """Return the row of each measured call in a table, and how many rows there are.

    Where it is not known which layers were left out, none was.
    """
    sites = measurements.layers
    numbers, totals = {site.layer for site in sites}, {site.num_layers for site in sites}
    total = sites[0].num_layers
    if None in numbers or total is None or len(totals) != 1 or len(numbers) != len(sites):
        return list(range(len(sites))), len(sites)
    return [site.layer for site in sites if site.layer is not None], total


def _window_palette(
    measurements: Measurements,
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return the windows of the candidates with the full one at the end, and their tile."""
    sites = measurements.layers
    tiles = {tile for site in sites for tile in site.tiles}
    grids = {site.grid_thw for site in sites}
    configs = [config for config in measurements.candidates if isinstance(config, STA)]
    plain = all(config.table is None and len(config.windows) == 1 for config in configs)
    if len(tiles) != 1 or len(grids) != 1 or not plain:
        raise CalibrationError(
            "windows of these candidates cannot stand in one table",
            got=f"tiles {sorted(tiles)} on grids {sorted(grids)}"
            + ("" if plain else ", and windows that differ by head"),
            expected="one tile, one grid, and one window for each candidate",
            next_step="measure STA candidates of one tile_thw, each with one window",
        )
    (tile,), (grid,) = tiles, grids
    return (*(config.windows[0] for config in configs), tuple(tiles_along(grid, tile))), tile
