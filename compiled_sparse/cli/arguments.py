"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence
from typing import Any

from compiled_sparse.errors import MissingExtraError

Commands = Any  # what add_subparsers returns; argparse gives that class no public name


def add_pattern_arguments(
    parser: argparse.ArgumentParser,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    tile: Sequence[int],
    any_axes: bool = False,
) -> None:
    """Add `--grid`, `--window` and `--tile` with these defaults.

    Args:
        parser: Where to.
        grid: Default of the grid.
        window: Default of the window.
        tile: Default of the tile.
        any_axes: Whether there may be fewer than three numbers.
    """
    for flag, default, what in (
        ("--grid", grid, "token grid after patching"),
        ("--window", window, "window of each tile, in tiles"),
        ("--tile", tile, "sides of a tile, in tokens"),
    ):
        _add_extents(parser, flag, default, what, any_axes=any_axes)


def _add_extents(
    parser: argparse.ArgumentParser,
    flag: str,
    default: Sequence[int],
    what: str,
    *,
    any_axes: bool,
) -> None:
    shown = " ".join(map(str, default))
    parser.add_argument(
        flag,
        nargs="+" if any_axes else 3,
        type=int,
        metavar="N" if any_axes else ("T", "H", "W"),
        default=tuple(default),
        help=f"{what} (default {shown})",
    )


def add_text_argument(parser: argparse.ArgumentParser, *, default: tuple[int, int] | None) -> None:
    """Add `--text`, the numbers of text tokens in front of the video and behind it."""
    parser.add_argument(
        "--text",
        nargs=2,
        type=int,
        metavar=("BEFORE", "AFTER"),
        default=default,
        help="text tokens around the video (default 0 0)",
    )


def positive(text: str) -> float:
    """Return a number above 0; an argparse type."""
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def count(minimum: int) -> Any:
    """Return an argparse type for integers of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    parse.__name__ = "integer"
    return parse


def require_packages(names: Sequence[str], *, extra: str, purpose: str) -> None:
    """Import optional packages, so that a missing one is named before any work is done.

    Raises:
        MissingExtraError: if one is not installed.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise MissingExtraError(name, extra=extra, purpose=purpose) from None
