"""What was measured, by density: how far from dense attention each candidate is, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compiled_sparse.calibration.fit import fit
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class CandidateErrors:
    """The errors of one candidate, each the root of the mean of the squared relative L2 errors.

    Args:
        spec: The candidate as a spec string.
        density: Fraction of (query, key) pairs attended to, averaged over layers.
        relative_error: Over all steps, layers and heads, as `Fit.relative_error` counts it.
        by_layer: By layer, over steps and heads.
    """

    spec: str
    density: float
    relative_error: float
    by_layer: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ErrorsByDensity:
    """The errors of all candidates, and what mixtures of them would give.

    Args:
        candidates: In the order of the measurements.
        layers: Module paths.
        num_steps: How many steps were measured.
        num_heads: Heads of a layer.
        curve: (predicted gain, relative error) as in `Fit.curve`; empty if no policy holds them.
        no_curve: Why there is no curve.
    """

    candidates: tuple[CandidateErrors, ...]
    layers: tuple[str, ...]
    num_steps: int
    num_heads: int
    curve: tuple[tuple[float, float], ...] = ()
    no_curve: str = ""


def errors_by_density(measurements: Measurements) -> ErrorsByDensity:
    """Sum up measurements for a picture; see `compiled_sparse.plots.plot_errors`.

    Args:
        measurements: What `measure` or `recording` returned.

    Raises:
        CalibrationError: if a relative error is not finite.
    """
    squares = measurements.mean("relative_squared_error")
    if not bool(squares.isfinite().all()):
        raise CalibrationError(
            "a relative error is not finite",
            got="a head whose dense output is zero where that of a candidate is not",
            expected="dense outputs other than zero",
            next_step="measure on inputs that reach every head",
        )
    curve, problem = _curve(measurements)
    return ErrorsByDensity(
        candidates=tuple(
            CandidateErrors(
                spec=config.describe(),
                density=_mean([site.densities[index] for site in measurements.layers]),
                relative_error=float(squares[:, :, index].mean().sqrt()),
                by_layer=tuple(squares[:, :, index].mean((0, 2)).sqrt().tolist()),
            )
            for index, config in enumerate(measurements.candidates)
        ),
        layers=tuple(site.path for site in measurements.layers),
        num_steps=len(measurements.steps),
        num_heads=measurements.layers[0].num_heads,
        curve=curve,
        no_curve=problem,
    )


def _curve(measurements: Measurements) -> tuple[tuple[tuple[float, float], ...], str]:
    """Return the curve of `fit`, or why the candidates cannot stand in one policy."""
    try:
        # Without a limit every candidate that is worth choosing is in the policy.
        return fit(measurements, max_error=math.inf).curve, ""
    except CalibrationError as error:
        return (), error.problem


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
