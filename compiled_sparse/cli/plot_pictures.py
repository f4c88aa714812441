"""The pictures of `compiled-sparse plot`: what each takes, what it draws, and its numbers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiled_sparse.calibration import errors_by_density
from compiled_sparse.calibration import load_measurements
from compiled_sparse.cli.mechanism import mechanism_of
from compiled_sparse.layout import Text
from compiled_sparse.plots import pattern_in
from compiled_sparse.plots import plot_density
from compiled_sparse.plots import plot_errors
from compiled_sparse.plots import plot_tile_order
from compiled_sparse.plots.drawing import draw
from compiled_sparse.plots.files import picture_path
from compiled_sparse.plots.files import write_picture
from compiled_sparse.plots.order import order_map
from compiled_sparse.plots.pattern import SHOWN
from compiled_sparse.plots.pattern import View
from compiled_sparse.policy_density import PATHS
from compiled_sparse.policy_density import policy_density

GRID, WINDOW, TILE = (21, 30, 52), (3, 3, 3), (6, 8, 8)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture that was written.

    Args:
        path: The file.
        numbers: What it shows, as JSON values.
    """

    path: Path
    numbers: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PictureCommand:
    """One of the pictures.

    Args:
        draw: Draws and writes it.
        takes: The arguments it takes, beside those of the output.
        needs: Those of them that have no default.
    """

    draw: Callable[[argparse.Namespace], Drawn]
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def _pattern(arguments: argparse.Namespace) -> Drawn:
    grid = tuple(arguments.grid or GRID)
    config = mechanism_of(arguments, window=WINDOW[-len(grid) :], tile=TILE[-len(grid) :])
    target = picture_path(arguments.output or f"{config.name}_pattern.png")
    query_tile = arguments.query_tile and tuple(arguments.query_tile)
    view = View(grid, _text(arguments), query_tile, seed=arguments.seed or 0)
    pattern = pattern_in(config, view)
    path = write_picture(draw(pattern), target)
    row = pattern.mask[pattern.row]
    numbers = {
        "picture": "pattern",
        "mechanism": config.describe(),
        "grid_thw": grid,
        "density": pattern.density,
        "query_blocks": pattern.mask.shape[0],
        "key_blocks": pattern.mask.shape[1],
        "query_block": pattern.row,
        "seen_blocks": (row == SHOWN).nonzero().flatten().tolist(),
    }
    return Drawn(path=path, numbers=numbers)


def _order(arguments: argparse.Namespace) -> Drawn:
    grid = tuple(arguments.grid or GRID)
    drawn = order_map(grid, tuple(arguments.tile or TILE[-len(grid) :]))
    path = plot_tile_order(drawn, path=arguments.output or "tile_order.png")
    order = drawn.order
    numbers = {
        "picture": "order",
        "grid_thw": order.grid_thw,
        "tile_thw": order.tile_thw,
        "tiles_per_axis": order.num_tiles,
        "tokens": order.total_seq_length,
        "slots": order.total_num_tiles * order.max_block_size,
        "tile_sizes": order.variable_block_sizes,
        "partial_tiles": drawn.partial_tiles,
    }
    return Drawn(path=path, numbers=numbers)


def _policy(arguments: argparse.Namespace) -> Drawn:
    table = policy_density(
        arguments.policy,
        grid_thw=tuple(arguments.grid or GRID),
        heads=arguments.heads,
        layers=arguments.layers,
        steps=arguments.steps,
        text=_text(arguments),
        paths=arguments.paths or PATHS,
    )
    path = plot_density(table, path=arguments.output or "policy_density.png")
    numbers = {"picture": "policy", **dataclasses.asdict(table), "mean": table.mean}
    return Drawn(path=path, numbers=numbers)


def _measurements(arguments: argparse.Namespace) -> Drawn:
    errors = errors_by_density(load_measurements(arguments.measurements))
    path = plot_errors(errors, path=arguments.output or "measured_errors.png")
    return Drawn(path=path, numbers={"picture": "measurements", **dataclasses.asdict(errors)})


def _text(arguments: argparse.Namespace) -> Text:
    return Text(*(arguments.text or ()))


PICTURES = {
    "": PictureCommand(
        draw=_pattern,
        takes=("grid", "window", "tile", "mechanism", "text", "query_tile", "seed"),
    ),
    "order": PictureCommand(draw=_order, takes=("grid", "tile")),
    "policy": PictureCommand(
        draw=_policy,
        takes=("grid", "text", "heads", "layers", "steps", "paths"),
        needs=("heads", "layers", "steps"),
    ),
    "measurements": PictureCommand(draw=_measurements),
}
"""By the argument that asks for it; the empty name is the pattern, drawn where none does."""
