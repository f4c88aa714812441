"""`compiled-sparse plot`: patterns, tile orders, the densities of a policy, errors, as pictures."""

from __future__ import annotations

import argparse
import json

from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_pattern_arguments
from compiled_sparse.cli.arguments import add_text_argument
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.mechanism import add_mechanism_argument
from compiled_sparse.cli.plot_pictures import GRID
from compiled_sparse.cli.plot_pictures import PICTURES
from compiled_sparse.cli.plot_pictures import TILE
from compiled_sparse.cli.plot_pictures import WINDOW
from compiled_sparse.errors import ConfigError
from compiled_sparse.policy_density import PATHS

PLOT_VERSION = 1

_EPILOG = """examples:
  compiled-sparse plot --grid 21 30 52 --mechanism vsa:sparsity=0.9
  compiled-sparse plot --order --grid 21 30 52 --tile 6 8 8 --output order.svg
  compiled-sparse plot --policy careful --grid 21 30 52 --heads 12 --layers 30 --steps 50
  compiled-sparse plot --measurements measured.json --json

grids, windows and tiles have one to three axes, T H W for a video
"""


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "plot",
        help="draw a pattern, a tile order, the densities of a policy, or measured errors",
        description="Draw which keys each tile of a grid attends to, under sliding tile attention "
        "or any other mechanism; or with --order, --policy or --measurements another picture.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_pictures(parser)
    add_pattern_arguments(parser, grid=GRID, window=WINDOW, tile=TILE, any_axes=True)
    add_mechanism_argument(parser)
    add_text_argument(parser, default=None)
    _add_view_arguments(parser)
    _add_model_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="picture to write: .png, .svg or .pdf (default sta_pattern.png, by the mechanism, or "
        "tile_order.png, policy_density.png, measured_errors.png)",
    )
    parser.add_argument("--json", action="store_true", help="print path and numbers as JSON")
    parser.set_defaults(run=run, grid=None)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--order",
        action="store_true",
        help="draw the order of tiles and tokens, with --grid and --tile",
    )
    pictures.add_argument(
        "--policy",
        metavar="POLICY",
        help="draw the densities of a policy by layer and step, with --grid, --heads, --layers and "
        "--steps: a name, a quality level, a spec string or a policy's JSON file",
    )
    pictures.add_argument(
        "--measurements",
        metavar="FILE",
        help="draw the errors that a calibration measured, by density and by layer",
    )


def _add_view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--query-tile",
        nargs="+",
        type=int,
        metavar="INDEX",
        help="position of the tile to look from, T H W in tiles, or one number where blocks are "
        "runs of the sequence (default the middle one)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="of the made-up queries and keys, for mechanisms that select by content (default 0)",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, what in (
        ("--heads", "query heads"),
        ("--layers", "attention calls over the video in a forward"),
        ("--steps", "denoising steps"),
    ):
        parser.add_argument(flag, type=count(1), metavar="N", help=f"with --policy: {what}")
    parser.add_argument(
        "--paths",
        metavar="PATH",
        help=f"with --policy: module path of a layer, its index as {{layer}} (default {PATHS})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture and print its path, or with `--json` its path and what is drawn.

    Raises:
        ConfigError: if the arguments are not those of one picture.
        CompiledSparseError: if it cannot be drawn.
    """
    asked = (name for name in PICTURES if getattr(arguments, name, None) not in (None, False))
    name = next(asked, "")
    _check_arguments(arguments, name)
    drawn = PICTURES[name].draw(arguments)
    if arguments.json:
        print(json.dumps({"version": PLOT_VERSION, "path": str(drawn.path), **drawn.numbers}))
    else:
        print(drawn.path)
    return 0


def _check_arguments(arguments: argparse.Namespace, name: str) -> None:
    known = {each for picture in PICTURES.values() for each in picture.takes}
    given = {each for each in known if getattr(arguments, each) is not None}
    takes, needs = PICTURES[name].takes, PICTURES[name].needs
    what = f"--{name}" if name else "the picture of a pattern"
    if stray := sorted(given.difference(takes)):
        raise ConfigError(
            "these arguments are not for this picture",
            got=f"{_flags(stray)} with {what}",
            expected=_flags(takes) or "none of them",
            next_step=f"leave out {_flags(stray)}, or ask for the picture they belong to",
        )
    if missing := [each for each in needs if each not in given]:
        raise ConfigError(
            "this picture needs to know more of the model",
            got=f"{what} without {_flags(missing)}",
            expected=_flags(needs),
            next_step=f"add {' and '.join(f'--{each} N' for each in missing)}",
        )


def _flags(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
