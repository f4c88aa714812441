"""Which config a site gets, and why: the policy's word, then what the site can take.

Pure functions of plain facts; the same ones serve the pass and the reports.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiled_sparse.config import STA
from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import auto_tile
from compiled_sparse.ops.checks import MAX_HEAD_DIM
from compiled_sparse.ops.checks import SUPPORTED_DTYPES
from compiled_sparse.pattern import sta_density
from compiled_sparse.policy import Policy

AUTO_MIN_TOKENS = 2048
AUTO_MIN_GAIN = 1.3
AUTO_WINDOW_FRACTION = 0.6
AUTO_MIN_WINDOW = 3

KERNEL_EFFICIENCY = 0.8
"""Share of the ideal speed-up (1 / density) the kernel reaches; see benchmarks/README.md."""


@dataclass(frozen=True)
class Refused:
    """The site stays dense.

    Args:
        reason: Code from `compiled_sparse.reasons`.
        detail: What was seen.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Chosen:
    """The site takes `config`.

    Args:
        config: The mechanism, with nothing left automatic but the tile.
        tile: Tile sides on this grid.
        density: Fraction of token pairs attended.
        predicted_gain: Predicted speed-up over dense attention.
    """

    config: STA
    tile: tuple[int, ...]
    density: float
    predicted_gain: float


def requested(policy: Policy, path: str) -> MechanismConfig:
    """Return what the policy asks for at a module path; no rule means dense."""
    matched = policy.match(path)
    return Dense() if matched is None else matched[1]


def tensors_supported(query: torch.Tensor, value: torch.Tensor) -> Refused | None:
    """Check dtype, head size, rank and device of a call's tensors (fake ones will do)."""
    if query.dim() != 4:
        return Refused("rank_unsupported", f"{query.dim()} dimensions")
    if query.dtype not in SUPPORTED_DTYPES:
        return Refused("dtype_unsupported", str(query.dtype))
    head_dim: object = query.shape[-1]
    value_dim: object = value.shape[-1]
    if not isinstance(head_dim, int) or head_dim > MAX_HEAD_DIM or value_dim != head_dim:
        return Refused("head_dim_unsupported", f"{head_dim} for queries, {value_dim} for values")
    if query.device.type != "cpu":
        return Refused("device_unsupported", query.device.type)
    return None


def needs_static_grid(config: MechanismConfig) -> bool:
    """Whether a config picks something by the grid, so that each grid compiles anew."""
    return isinstance(config, Auto) or (isinstance(config, STA) and config.tile_thw == "auto")


def choose(
    config: MechanismConfig, grid: tuple[int, ...], text_before: int, text_after: int, heads: int
) -> Chosen | Refused:
    """Decide what a proven video self-attention call becomes.

    Args:
        config: What was asked for.
        grid: Token grid as integers.
        text_before: Text tokens in front of the grid.
        text_after: Text tokens behind it.
        heads: Number of query heads.

    Returns:
        The choice with its density and predicted gain, or why the call stays dense.
    """
    if isinstance(config, Auto):
        return _choose_auto(grid, text_before, text_after)
    if not isinstance(config, STA):
        return Refused("policy_dense")
    if config.num_axes != len(grid):
        return Refused("axes_mismatch", f"config has {config.num_axes}, grid has {len(grid)}")
    if len(config.windows) not in (1, heads):
        return Refused("heads_mismatch", f"{len(config.windows)} windows, {heads} heads")
    return _evaluate(config, BlockLayout(grid, config.resolve_tile(grid), text_before, text_after))


def _evaluate(config: STA, layout: BlockLayout) -> Chosen:
    windows = config.windows
    density = sta_density(layout, windows)
    return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density)


def _choose_auto(grid: tuple[int, ...], text_before: int, text_after: int) -> Chosen | Refused:
    layout = BlockLayout(grid, auto_tile(grid), text_before, text_after)
    if layout.num_tokens < AUTO_MIN_TOKENS:
        return Refused("too_short", f"{layout.num_tokens} tokens")
    window = tuple(_auto_window(num_tiles) for num_tiles in layout.tiles_per_axis)
    chosen = _evaluate(STA(window_thw=window, tile_thw="auto"), layout)
    if chosen.predicted_gain < AUTO_MIN_GAIN:
        return Refused("no_gain", f"predicted {chosen.predicted_gain:.1f}x")
    return chosen


def _auto_window(num_tiles: int) -> int:
    """The odd window nearest to a fixed share of the axis: cautious, as nobody tuned it."""
    nearest_odd = 2 * round((AUTO_WINDOW_FRACTION * num_tiles - 1) / 2) + 1
    return max(AUTO_MIN_WINDOW, nearest_odd)
