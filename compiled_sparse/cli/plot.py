"""`compiled-sparse plot`: a picture of the attention pattern on a grid."""

from __future__ import annotations

import argparse

from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_pattern_arguments
from compiled_sparse.cli.arguments import add_text_argument
from compiled_sparse.cli.mechanism import add_mechanism_argument
from compiled_sparse.cli.mechanism import mechanism_of
from compiled_sparse.layout import Text
from compiled_sparse.plots import plot_pattern

WINDOW, TILE = (3, 3, 3), (6, 8, 8)


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "plot",
        help="draw the attention pattern on a grid",
        description="Draw which keys each tile of a grid attends to, under sliding tile attention "
        "or any other mechanism.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pattern_arguments(parser, grid=(21, 30, 52), window=WINDOW, tile=TILE)
    add_mechanism_argument(parser)
    add_text_argument(parser, default=(0, 0))
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
        default=0,
        help="of the made-up queries and keys, for mechanisms that select by content (default 0)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="picture to write: .png, .svg or .pdf (default sta_pattern.png, by the mechanism)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture and print its path.

    Raises:
        ConfigError: if `--mechanism` and the arguments of sliding tile attention are given.
    """
    before, after = arguments.text
    config = mechanism_of(arguments, window=WINDOW, tile=TILE)
    path = plot_pattern(
        config,
        tuple(arguments.grid),
        text=Text(before, after),
        query_tile=arguments.query_tile and tuple(arguments.query_tile),
        seed=arguments.seed,
        path=arguments.output or f"{config.name}_pattern.png",
    )
    print(path)
    return 0
