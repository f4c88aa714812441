"""Sliding tile attention, registered: config, op, reference and automatic choice in one record."""

from __future__ import annotations

from typing import Any

import torch

from compiled_sparse.config import STA
from compiled_sparse.config import Auto
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import sta as _op  # noqa: F401 - defines the op
from compiled_sparse.ops import sta_scheduled as _scheduled_op  # noqa: F401 - defines the op
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.ops.sta import flatten_windows
from compiled_sparse.pattern import sta_density
from compiled_sparse.pattern import table_density
from compiled_sparse.reference.sta import sta_token_mask
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall
from compiled_sparse.registry import Refused

AUTO_MIN_WINDOW = 3


def _evaluate(config: STA, layout: BlockLayout, heads: int) -> Chosen | Refused:
    if config.num_heads not in (1, heads):
        return Refused("heads_mismatch", f"{config.num_heads} windows, {heads} heads")
    if config.table is None:
        density = sta_density(layout, config.windows)
        return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density)
    density, low, high = table_density(layout, config.table)
    detail = f"density {low:.3f} to {high:.3f} by step and layer"
    return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density, detail)


def _lower(
    config: STA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> OpCall:
    windows = flatten_windows(config.windows)
    arguments = (grid, list(tile), windows, text_before, text_after)
    ops = torch.ops.compiled_sparse
    if config.table is None:
        return OpCall(ops.sta.default, arguments)
    return OpCall(ops.sta_scheduled.default, arguments, ("windows", "step", "layer"))


def _automatic(auto: Auto, layout: BlockLayout) -> STA:
    window = tuple(_window(n, auto.window_fraction) for n in layout.tiles_per_axis)
    return STA(window_thw=window, tile_thw="auto")


def _window(num_tiles: int, fraction: float) -> int:
    """The odd window nearest to a share of the axis, never less than the neighbours."""
    if fraction >= 1.0:
        return num_tiles
    nearest_odd = 2 * round((fraction * num_tiles - 1) / 2) + 1
    return max(AUTO_MIN_WINDOW, nearest_odd)


MECHANISM = Mechanism(
    config=STA,
    capabilities=KERNEL_CAPABILITIES,
    evaluate=_evaluate,
    lower=_lower,
    token_mask=sta_token_mask,
    automatic=_automatic,
)
