"""Which config a site gets, and why: the policy's word, then what the site can take.

Pure functions of plain facts; the same ones serve the pass and the reports.
"""

from __future__ import annotations

import torch

from compiled_sparse import registry
from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import auto_tile
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.policy import Policy
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Capabilities
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused

__all__ = [
    "AUTO_MIN_GAIN",
    "AUTO_MIN_TOKENS",
    "KERNEL_EFFICIENCY",
    "Chosen",
    "Refused",
    "capabilities_of",
    "choose",
    "needs_static_grid",
    "requested",
    "tensors_supported",
]

AUTO_MIN_TOKENS = Auto().min_tokens
AUTO_MIN_GAIN = Auto().min_gain


def requested(policy: Policy, path: str) -> MechanismConfig:
    """Return what the policy asks for at a module path; no rule means dense."""
    matched = policy.match(path)
    return Dense() if matched is None else matched[1]


def capabilities_of(config: MechanismConfig) -> Capabilities:
    """Return what tensors a config's mechanism takes; for `Dense` and the like, the kernel's."""
    if isinstance(config, Auto):
        return registry.automatic().capabilities
    mechanism = registry.mechanism_of(config)
    return KERNEL_CAPABILITIES if mechanism is None else mechanism.capabilities


def tensors_supported(
    query: torch.Tensor,
    value: torch.Tensor,
    capabilities: Capabilities = KERNEL_CAPABILITIES,
) -> Refused | None:
    """Check dtype, head size, rank and device of a call's tensors (fake ones will do)."""
    if query.dim() != 4:
        return Refused("rank_unsupported", f"{query.dim()} dimensions")
    if query.dtype not in capabilities.dtypes:
        return Refused("dtype_unsupported", str(query.dtype))
    head_dim: object = query.shape[-1]
    value_dim: object = value.shape[-1]
    limit = capabilities.max_head_dim
    if not isinstance(head_dim, int) or head_dim > limit or value_dim != head_dim:
        return Refused("head_dim_unsupported", f"{head_dim} for queries, {value_dim} for values")
    if query.device.type not in capabilities.devices:
        return Refused("device_unsupported", query.device.type)
    if capabilities.forward_only and query.requires_grad:
        return Refused("forward_only", "the queries need a gradient")
    return None


def needs_static_grid(config: MechanismConfig) -> bool:
    """Whether a config picks something by the grid, so that each grid compiles anew."""
    return config.needs_static_grid


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
        layout = BlockLayout(grid, auto_tile(grid), text_before, text_after)
        return _choose_auto(config, layout, heads)
    mechanism = registry.mechanism_of(config)
    if mechanism is None:
        return Refused("policy_dense")
    if config.num_axes not in (None, len(grid)):
        return Refused("axes_mismatch", f"config has {config.num_axes}, grid has {len(grid)}")
    if len(grid) not in mechanism.capabilities.num_axes:
        return Refused("axes_mismatch", f"{config.name} takes no grid of {len(grid)} axes")
    layout = BlockLayout(grid, config.resolve_tile(grid), text_before, text_after)
    chosen: Chosen | Refused = mechanism.evaluate(config, layout, heads)
    return chosen


def _choose_auto(auto: Auto, layout: BlockLayout, heads: int) -> Chosen | Refused:
    if layout.num_tokens < auto.min_tokens:
        return Refused("too_short", f"{layout.num_tokens} tokens")
    mechanism = registry.automatic()
    assert mechanism.automatic is not None
    chosen = mechanism.evaluate(mechanism.automatic(auto, layout), layout, heads)
    if isinstance(chosen, Chosen) and chosen.predicted_gain < auto.min_gain:
        return Refused("no_gain", f"predicted {chosen.predicted_gain:.1f}x")
    return chosen
