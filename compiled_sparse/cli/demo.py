"""`compiled-sparse demo`: a video transformer compiled sparse, checked, timed and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import compiled_sparse as cs
from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_pattern_arguments
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.arguments import require_packages
from compiled_sparse.cli.measure import Timing
from compiled_sparse.cli.screen import Screen
from compiled_sparse.cli.trial import Result
from compiled_sparse.cli.trial import Settings
from compiled_sparse.cli.trial import run_trial
from compiled_sparse.cli.wan import video_size
from compiled_sparse.layout import check_extents
from compiled_sparse.options import INNER_COMPILERS

CHECK_FAILED = 1

_GRID = (5, 30, 52)  # 17 frames of 480x832: 7,800 tokens
_TILE = (5, 6, 4)
_WINDOW = (3, 3, 3)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="compile a small video model, compare sparse with dense",
        description="Compile diffusers' WanTransformer3DModel, random weights, with sparse "
        "attention; compare its output with a dense masked reference and its time with plain "
        "torch.compile; draw the attention pattern.",
    )
    add_pattern_arguments(parser, grid=_GRID, window=_WINDOW, tile=_TILE)
    for flag, minimum, default, what in (
        ("--layers", 1, 2, "transformer blocks"),
        ("--heads", 1, 4, "attention heads"),
        ("--head-dim", 1, 64, "channels per head"),
        ("--rounds", 0, 5, "timed rounds, 0 for none"),
        ("--seed", 0, 0, "seed of weights and inputs"),
    ):
        text = f"{what} (default {default})"
        parser.add_argument(flag, type=count(minimum), default=default, metavar="N", help=text)
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of weights and inputs (default %(default)s)",
    )
    parser.add_argument(
        "--inner",
        choices=INNER_COMPILERS,
        help="compiler of both models (default inductor; eager where inductor does not work)",
    )
    parser.add_argument(
        "--output",
        default="sta_pattern.png",
        metavar="PATH",
        help="picture to write: .png, .svg or .pdf (default %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, progress to stderr"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print what it found.

    Returns:
        0 if every video self-attention became sparse and the output agrees with the reference,
        else 1.

    Raises:
        MissingExtraError: if a package of the demo extra is not installed.
        CompiledSparseError: if the request cannot be carried out.
    """
    require_packages(("rich", "matplotlib", "diffusers"), extra="demo", purpose="the demo")
    settings = _settings(arguments)
    screen = Screen(to_stderr=arguments.json)
    _show_settings(screen, settings)
    with torch.no_grad(), screen.steps(settings.num_steps) as steps:
        result = run_trial(settings, steps)
    _show_result(screen, result, settings)
    if arguments.json:
        print(result.to_json())
    return CHECK_FAILED if result.problems else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    grid = tuple(arguments.grid)
    check_extents("--grid", grid)
    return Settings(
        sta=cs.STA(window_thw=tuple(arguments.window), tile_thw=tuple(arguments.tile)),
        grid_thw=grid,
        layers=arguments.layers,
        heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype=_DTYPES[arguments.dtype],
        rounds=arguments.rounds,
        seed=arguments.seed,
        inner=arguments.inner,
        output=Path(arguments.output),
    )


def _show_settings(screen: Screen, settings: Settings) -> None:
    grid = settings.grid_thw
    frames, height, width = video_size(grid)
    dtype = str(settings.dtype).removeprefix("torch.")
    screen.line(
        f"WanTransformer3DModel, random weights, {dtype}: layers {settings.layers}, "
        f"heads {settings.heads}, head_dim {settings.head_dim}"
    )
    screen.line(
        f"video of {frames} frames of {height}x{width}: grid {_times(grid)}, "
        f"{torch.Size(grid).numel():,} tokens"
    )
    screen.line(f"policy {settings.sta.describe()}")
    screen.line(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    screen.line()


def _show_result(screen: Screen, result: Result, settings: Settings) -> None:
    screen.report(result.report)
    agreement = result.agreement
    if agreement is not None:
        rows = [
            ("largest absolute error", f"{agreement.max_error:.1e}"),
            ("relative error", f"{agreement.relative_error:.1e}"),
            ("tolerance", f"{agreement.tolerance:.0e}"),
            ("relative difference of the dense model", f"{result.dense_difference:.1e}"),
        ]
        verdict = "passed" if agreement.passed else "FAILED"
        screen.table(f"Compiled sparse model against the reference: {verdict}", rows)
    if result.timing is not None:
        _show_timing(screen, result.timing, result.inner)
    if result.picture is not None:
        screen.line()
        screen.line(f"Attention pattern drawn: {result.picture}")
    for problem in result.problems:
        screen.line(f"FAILED: {problem}", style="bold red")


def _show_timing(screen: Screen, timing: Timing, inner: str) -> None:
    rows = [
        (f"dense, torch.compile with {inner}", f"{timing.dense:.3f} s"),
        ("sparse, backend compiled_sparse", f"{timing.sparse:.3f} s"),
        ("speed-up, measured", f"{timing.speedup:.2f}x"),
        ("speed-up if attention time followed the density", f"{timing.ideal:.2f}x"),
        ("density of the sparse attention", f"{timing.density:.3f}"),
    ]
    title = f"Time per forward, median of {timing.rounds} interleaved rounds"
    screen.table(title, rows)


def _times(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))
