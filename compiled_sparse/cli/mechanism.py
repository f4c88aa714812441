"""The mechanism a command is about: any, or sliding tile attention by its window and tile."""

from __future__ import annotations

import argparse

from compiled_sparse.config import STA
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError

Sides = tuple[int, ...]


def add_mechanism_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--mechanism` to a parser that has `--window` and `--tile`."""
    # What was not given has to be seen: with --mechanism neither may be.
    parser.set_defaults(window=None, tile=None)
    parser.add_argument(
        "--mechanism",
        metavar="SPEC",
        help="any mechanism, instead of --window and --tile, such as vsa:sparsity=0.9 or "
        "sla:block_q=4x8x4,block_k=4x4x4",
    )


def mechanism_of(arguments: argparse.Namespace, *, window: Sides, tile: Sides) -> MechanismConfig:
    """Return the mechanism that was asked for.

    Args:
        arguments: What was given.
        window: Window of sliding tile attention where nothing else was given.
        tile: Its tile, in the same way.

    Raises:
        ConfigError: if `--mechanism` and the arguments of sliding tile attention are given.
    """
    sides = {"--window": arguments.window, "--tile": arguments.tile}
    given = [flag for flag, value in sides.items() if value is not None]
    if arguments.mechanism is None:
        return STA(
            window_thw=tuple(arguments.window or window), tile_thw=tuple(arguments.tile or tile)
        )
    if given:
        raise ConfigError(
            "--mechanism says all there is to say about the mechanism",
            got=f"--mechanism {arguments.mechanism} and {' and '.join(given)}",
            expected="--mechanism, or --window and --tile",
            next_step="write --mechanism sta:window_thw=3x3x3,tile_thw=6x8x8, for instance",
        )
    return parse_spec(arguments.mechanism)
