"""`compiled-sparse calibrate tune` and `tune-cfg`: from losses in files to a strategy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compiled_sparse.calibration import Strategy
from compiled_sparse.calibration import parse_candidates
from compiled_sparse.calibration import tune
from compiled_sparse.calibration import tune_cfg
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.tuning import DENSE_FIRST_STEPS
from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import count
from compiled_sparse.config import STA
from compiled_sparse.policy import Policy
from compiled_sparse.windows import Window

VERSION = 1


def add_parsers(commands: Commands) -> None:
    """Add both commands to the parser."""
    parser = commands.add_parser(
        "tune",
        help="choose a window for every step, layer and head by the losses in a folder",
        description="Average the losses of all searches in a folder and choose the window of "
        "least L2 loss for each head; the first steps keep the full window.",
        epilog="example:\n"
        "  compiled-sparse calibrate tune searches --full-window 3,6,10 --output strategy.json\n"
        "      --policy policy.json --tile 6 8 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="with the files of `search`")
    _add_arguments(parser)
    parser.set_defaults(run=_run_tune)
    parser = commands.add_parser(
        "tune-cfg",
        help="the same with the searches of both halves of guidance",
        description="As tune, over two folders: calls with the prompt and with the negative one. "
        "Each file of both has the same weight.",
        epilog="example:\n"
        "  compiled-sparse calibrate tune-cfg positive negative --full-window 3,6,10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("positive", metavar="POSITIVE", help="folder of calls with the prompt")
    parser.add_argument(
        "negative", metavar="NEGATIVE", help="folder of those with the negative one"
    )
    _add_arguments(parser)
    parser.set_defaults(run=_run_tune_cfg)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full-window",
        required=True,
        metavar="T,H,W",
        help="the window that is dense attention: tiles along each axis of the grid",
    )
    parser.add_argument(
        "--window", action="append", metavar="T,H,W", help="choose among these only (default all)"
    )
    parser.add_argument(
        "--dense-first-steps",
        type=count(0),
        default=DENSE_FIRST_STEPS,
        metavar="N",
        help="steps at the start with the full window (default %(default)s, as published)",
    )
    parser.add_argument(
        "--output",
        default="mask_strategy.json",
        metavar="FILE",
        help="strategy to write, in the published form (default %(default)s)",
    )
    parser.add_argument(
        "--policy", metavar="FILE", help="also write it as a policy of this package; needs --tile"
    )
    parser.add_argument(
        "--tile", nargs=3, type=int, metavar=("T", "H", "W"), help="tile of the policy, in tokens"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_tune(arguments: argparse.Namespace) -> int:
    return _finish(arguments, tune(arguments.folder, **_settings(arguments)))


def _run_tune_cfg(arguments: argparse.Namespace) -> int:
    found = tune_cfg(arguments.positive, arguments.negative, **_settings(arguments))
    return _finish(arguments, found)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "full_window": _full_window(arguments),
        "candidates": parse_candidates(arguments.window) if arguments.window else None,
        "dense_first_steps": arguments.dense_first_steps,
    }


def _full_window(arguments: argparse.Namespace) -> Window:
    return parse_candidates([arguments.full_window])[0]


def _finish(arguments: argparse.Namespace, strategy: Strategy) -> int:
    strategy.save(arguments.output)
    files = [arguments.output]
    if arguments.policy:
        tile = {} if arguments.tile is None else {"tile_thw": tuple(arguments.tile)}
        config = STA(window_thw=strategy.to_table(), **tile)
        write_atomically(Path(arguments.policy), Policy({"*": config}).to_json() + "\n")
        files.append(arguments.policy)
    full = _full_window(arguments)
    usage = {",".join(map(str, window)): number for window, number in strategy.usage().items()}
    result: dict[str, Any] = {
        "version": VERSION,
        "files": files,
        "nominal_sparsity": strategy.nominal_sparsity(full),
        "effective_sparsity": strategy.effective_sparsity(full),
        "usage": usage,
    }
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(
        "sparsity: nominal {nominal_sparsity:.3f}, effective {effective_sparsity:.3f}".format(
            **result
        )
    )
    for window, number in usage.items():
        print(f"{window:>10}  {number} heads")
    print("\n".join(map(str, files)))
    return 0
