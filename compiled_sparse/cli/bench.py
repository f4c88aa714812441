"""`compiled-sparse bench`: sparse attention beside dense on this machine, and tuning of kernels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_pattern_arguments
from compiled_sparse.cli.arguments import add_text_argument
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.attention_bench import DTYPES
from compiled_sparse.cli.attention_bench import Settings
from compiled_sparse.cli.attention_bench import measure
from compiled_sparse.cli.mechanism import add_mechanism_argument
from compiled_sparse.cli.mechanism import mechanism_of
from compiled_sparse.cli.tune import tune_tiles
from compiled_sparse.layout import Text

BENCH_VERSION = 1
WINDOW, TILE = (3, 3, 3), (4, 6, 8)


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time sparse attention beside dense on this machine",
        description="Time one sparse attention call beside dense attention on this machine, or "
        "find the fastest tiles of the GPU kernels. Queries, keys and values are made up.",
        epilog="examples:\n"
        "  compiled-sparse bench --grid 8 24 40 --heads 4\n"
        "  compiled-sparse bench --mechanism vsa:sparsity=0.9 --text 0 226 --dtype float32\n"
        "  compiled-sparse bench --mechanism swba:block=256,window=3 --flex\n"
        "  compiled-sparse bench --tune tiles.json    (on a GPU; COMPILED_SPARSE_TUNING=tiles.json "
        "then uses it)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pattern_arguments(parser, grid=(8, 24, 40), window=WINDOW, tile=TILE)
    add_mechanism_argument(parser)
    add_text_argument(parser, default=(0, 0))
    parser.add_argument("--heads", type=count(1), default=4, help="default %(default)s")
    parser.add_argument("--head-dim", type=count(1), default=64, help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument(
        "--layer", type=count(0), default=0, help="where layers differ (default %(default)s)"
    )
    parser.add_argument("--rounds", type=count(1), default=7, help="default %(default)s")
    parser.add_argument(
        "--flex",
        action="store_true",
        help="also time compiled flex_attention with the same blocks, which must be full ones",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tune",
        type=Path,
        metavar="TABLE",
        help="measure the tiles of the GPU kernels instead and write a table of the fastest",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, or tune, and print what was found."""
    result = tune_tiles(arguments.tune) if arguments.tune else measure(_settings(arguments))
    if arguments.json:
        print(json.dumps({"version": BENCH_VERSION, **result}))
    else:
        print("\n".join(f"{name:<16}{_shown(value)}" for name, value in result.items()))
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        config=mechanism_of(arguments, window=WINDOW, tile=TILE),
        grid=tuple(arguments.grid),
        text=Text(*arguments.text),
        heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype=DTYPES[arguments.dtype],
        layer=arguments.layer,
        rounds=arguments.rounds,
        flex=arguments.flex,
    )


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
