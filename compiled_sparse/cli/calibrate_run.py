"""`compiled-sparse calibrate run`: measure any candidates, make a policy of them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiled_sparse.calibration import Fit
from compiled_sparse.calibration import Measurements
from compiled_sparse.calibration import fit
from compiled_sparse.calibration import measure
from compiled_sparse.calibration import measure_captured
from compiled_sparse.calibration import save_measurements
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.fit import check_targets
from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.workload import add_workload_arguments
from compiled_sparse.cli.workload import load_workload
from compiled_sparse.cli.workload import progress
from compiled_sparse.errors import CalibrationError

VERSION = 1
_DEMO_CANDIDATES = tuple(
    f"sta:window_thw={window},tile_thw=5x3x3" for window in ("1x1x3", "1x3x1", "1x3x3")
)


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "run",
        help="measure candidates and write the policy that meets a target",
        description="Measure candidates beside dense attention in a model's own calls, or on "
        "captured queries, keys and values, and write the policy that meets a target: sparse "
        "where it costs least, by layer, and for windows of STA by step and head, too.",
        epilog="examples:\n"
        "  compiled-sparse calibrate run --demo\n"
        "  compiled-sparse calibrate run wan.py:calls --max-error 0.1 --journal wan.journal\n"
        "      --candidate sta:window_thw=3x3x3,tile_thw=3x5x4\n"
        "      --candidate sta:window_thw=5x3x5,tile_thw=3x5x4\n"
        "  compiled-sparse calibrate run --captured folder --candidate vsa:sparsity=0.9\n"
        "      --candidate vsa:sparsity=0.8 --min-gain 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser)
    parser.add_argument(
        "--captured", metavar="FOLDER", help="files of calibration.capture, instead of a model"
    )
    parser.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="SPEC",
        help="mechanism to measure, such as vsa:sparsity=0.9; as often as there are candidates",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="largest relative error of attention, root mean square (default 0.1)",
    )
    target.add_argument(
        "--min-gain", type=float, metavar="G", help="smallest predicted speed-up of attention"
    )
    parser.add_argument(
        "--dense-first-steps",
        type=count(0),
        default=0,
        metavar="N",
        help="steps at the start that stay dense whatever is measured (default %(default)s)",
    )
    parser.add_argument(
        "--output",
        default="policy.json",
        metavar="FILE",
        help="policy to write (default %(default)s)",
    )
    parser.add_argument("--measurements", metavar="FILE", help="also write all that was measured")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, choose, write the policy and say what it is.

    Raises:
        CompiledSparseError: if the request cannot be carried out.
    """
    max_error = arguments.max_error
    if max_error is None and arguments.min_gain is None:
        max_error = 0.1
    check_targets(max_error, arguments.min_gain, arguments.dense_first_steps)
    measurements = _measure(arguments)
    if arguments.measurements:
        save_measurements(measurements, arguments.measurements)
    found = fit(
        measurements,
        max_error=max_error,
        min_gain=arguments.min_gain,
        dense_first_steps=arguments.dense_first_steps,
    )
    write_atomically(Path(arguments.output), found.policy.to_json() + "\n")
    rows = _rows(measurements, found)
    if arguments.json:
        print(json.dumps(_document(arguments, measurements, found, rows)))
    else:
        _print(arguments, found, rows)
    return 0


def _measure(arguments: argparse.Namespace) -> Measurements:
    candidates = arguments.candidate or (_DEMO_CANDIDATES if arguments.demo else [])
    if not candidates:
        raise CalibrationError(
            "there is nothing to measure",
            got="no --candidate",
            expected="at least one",
            next_step="pass --candidate sta:window_thw=3x3x3,tile_thw=6x8x8, for instance",
        )
    if arguments.captured:
        return _measure_captured(arguments, candidates)
    workload = load_workload(arguments, "--captured FOLDER")
    with progress(workload.num_calls) as done:
        return measure(
            workload.model,
            workload.calls,
            candidates,
            journal=arguments.journal,
            inner=arguments.inner,
            on_call=done,
        )


def _measure_captured(arguments: argparse.Namespace, candidates: Sequence[str]) -> Measurements:
    if arguments.entry or arguments.demo:
        raise CalibrationError(
            "a calibration is of a model or of captured calls",
            got=f"--captured {arguments.captured} and a model",
            expected="one of them",
            next_step="leave the other out",
        )
    with progress(None) as done:
        return measure_captured(
            arguments.captured, candidates, journal=arguments.journal, on_call=done
        )


def _rows(measurements: Measurements, found: Fit) -> list[dict[str, Any]]:
    """What was measured of each candidate, over everything."""
    error = measurements.mean("relative_squared_error").mean((0, 1, 3))
    cosine = measurements.mean("cosine").mean((0, 1, 3))
    mass = measurements.mean("captured_mass").mean((0, 1, 3))
    layers = measurements.layers
    return [
        {
            "candidate": config.describe(),
            "density": sum(site.densities[index] for site in layers) / len(layers),
            "relative_error": math.sqrt(float(error[index])),
            "cosine": float(cosine[index]),
            "captured_mass": float(mass[index]),
            "places": found.usage[config.describe()],
        }
        for index, config in enumerate(measurements.candidates)
    ]


def _document(
    arguments: argparse.Namespace,
    measurements: Measurements,
    found: Fit,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "policy": str(arguments.output),
        "relative_error": found.relative_error,
        "density": found.density,
        "predicted_gain": found.predicted_gain,
        "dense_places": found.usage["dense"],
        "candidates": rows,
        "calls": len(measurements.calls),
        "steps": list(measurements.steps),
        "layers": [site.path for site in measurements.layers],
        "curve": [{"predicted_gain": gain, "relative_error": error} for gain, error in found.curve],
    }


def _print(arguments: argparse.Namespace, found: Fit, rows: list[dict[str, Any]]) -> None:
    width = max(len(row["candidate"]) for row in rows)
    print(f"{'candidate':{width}}  density   error  cosine    mass  places")
    for row in rows:
        print(
            f"{row['candidate']:{width}}  {row['density']:7.3f} {row['relative_error']:7.4f} "
            f"{row['cosine']:7.4f} {row['captured_mass']:7.4f} {row['places']:7}"
        )
    print(f"{'dense attention':{width}}    1.000  0.0000  1.0000  1.0000 {found.usage['dense']:7}")
    print(
        f"\nchosen: relative error {found.relative_error:.4f} as measured, density "
        f"{found.density:.3f}, predicted gain {found.predicted_gain:.2f}x (attention alone)"
    )
    print(arguments.output)
