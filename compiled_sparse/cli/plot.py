"""`compiled-sparse plot`: a picture of the attention pattern on a grid."""

from __future__ import annotations

import argparse

from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_pattern_arguments
from compiled_sparse.config import STA
from compiled_sparse.layout import Text
from compiled_sparse.plots import plot_pattern


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "plot",
        help="draw the attention pattern on a grid",
        description="Draw which keys each tile of a grid attends to.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pattern_arguments(parser, grid=(21, 30, 52), window=(3, 3, 3), tile=(6, 8, 8))
    parser.add_argument(
        "--text",
        nargs=2,
        type=int,
        metavar=("BEFORE", "AFTER"),
        default=(0, 0),
        help="text tokens around the video (default 0 0)",
    )
    parser.add_argument(
        "--query-tile",
        nargs=3,
        type=int,
        metavar=("T", "H", "W"),
        help="position of the tile to look from, in tiles (default the middle one)",
    )
    parser.add_argument(
        "--output",
        default="sta_pattern.png",
        metavar="PATH",
        help="picture to write: .png, .svg or .pdf (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture and print its path."""
    before, after = arguments.text
    path = plot_pattern(
        STA(window_thw=tuple(arguments.window), tile_thw=tuple(arguments.tile)),
        tuple(arguments.grid),
        text=Text(before, after),
        query_tile=arguments.query_tile and tuple(arguments.query_tile),
        path=arguments.output,
    )
    print(path)
    return 0
