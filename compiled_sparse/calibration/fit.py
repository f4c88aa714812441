"""From measurements to a policy: the sparsity goes where it costs least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compiled_sparse.calibration.frontier import DENSE
from compiled_sparse.calibration.frontier import Choices
from compiled_sparse.calibration.frontier import Place
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
    time is predicted from the density, as in reports; the error is what was measured.

    Args:
        measurements: What `measure` or `recording` returned.
        max_error: Largest relative error, as `Fit.relative_error` counts it, such as 0.1.
        min_gain: Smallest predicted speed-up of attention, such as 2.0, in place of `max_error`.
        dense_first_steps: Steps at the start that stay dense whatever was measured.

    Raises:
        CalibrationError: if not one of the targets is given or it is out of range, the gain cannot
            be reached with these candidates, a step was not measured, or candidates cannot be
            put in one policy.
    """
    _check_targets(max_error, min_gain, dense_first_steps)
    by_head = all(isinstance(config, STA) for config in measurements.candidates)
    errors = measurements.mean("relative_squared_error")
    free = [i for i, step in enumerate(measurements.steps) if step >= dense_first_steps]
    places = _places(measurements, errors[free], by_head=by_head)
    # Dense steps are places, too: they weigh in every mean, and have no alternative.
    share = len(free) / errors.shape[0]
    choices = choose(
        places,
        max_error=None if max_error is None else max_error**2 / share if share else 0.0,
        max_cost=None if min_gain is None else _cost_of_rest(1 / min_gain, share),
    )
    reached = choices.curve[choices.taken - 1]
    gain = 1 / (1 - share + share * reached.cost)
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
        density=1 - share + share * _density(measurements, choices, len(places)),
        predicted_gain=gain,
        curve=tuple(
            (1 / (1 - share + share * point.cost), math.sqrt(share * max(point.error, 0.0)))
            for point in choices.curve
        ),
        usage=_usage(measurements, choices),
    )


def _check_targets(max_error: Any, min_gain: Any, dense_first_steps: Any) -> None:
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


def _cost_of_rest(wanted: float, share: float) -> float:
    """Cost of the free steps at which all steps together cost what is wanted."""
    return (wanted - (1 - share)) / share if share else 1.0


def _places(measurements: Measurements, errors: Tensor, *, by_head: bool) -> list[Place]:
    """Places in the order steps, layers, heads; or layers alone.

    Args:
        measurements: For the densities.
        errors: [steps, layers, candidates, heads].
        by_head: Whether each step and head is a place.
    """
    costs = [[_cost(density) for density in site.densities] for site in measurements.layers]
    if not by_head:
        of_layers = errors.mean((0, 3)).tolist() if len(errors) else []
        return [Place(costs[layer], row) for layer, row in enumerate(of_layers)]
    return [
        Place(costs[layer], row)
        for of_step in errors.transpose(2, 3).tolist()
        for layer, of_layer in enumerate(of_step)
        for row in of_layer
    ]


def _cost(density: float) -> float:
    return min(1.0, density / KERNEL_EFFICIENCY)


def _density(measurements: Measurements, choices: Choices, places: int) -> float:
    per_layer = [site.densities for site in measurements.layers]
    group = measurements.layers[0].num_heads if places != len(per_layer) else 1
    return sum(
        1.0 if index == DENSE else per_layer[number // group % len(per_layer)][index]
        for number, index in enumerate(choices.chosen)
    ) / max(1, places)


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
    layers, heads = len(measurements.layers), measurements.layers[0].num_heads
    table = [
        [[len(windows) - 1] * heads for _ in range(layers)] for _ in range(measurements.num_steps)
    ]
    chosen = iter(choices.chosen)
    for position in free:
        for layer in range(layers):
            row = [next(chosen) for _ in range(heads)]
            table[measurements.steps[position]][layer] = [i % len(windows) for i in row]
    is_same = all(rows == table[-1] for rows in table[dense_first_steps:])
    choice = [table[-1]] if is_same else table
    config = STA(window_thw=WindowTable(windows=windows, choice=choice), tile_thw=tile)  # type: ignore[arg-type]
    return Policy({"*": config}, dense_first_steps=dense_first_steps)


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
