"""Sparse-linear attention, registered: config, op and reference in one record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compiled_sparse.config_sla import SLA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import sla as _op  # noqa: F401 - defines the op
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.pattern import top_k_density
from compiled_sparse.reference.sla import sla_attention
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall
from compiled_sparse.sparsity import truncated_top_k

RUNTIME_INPUTS = ("given_sparsity", "proj_weight", "proj_bias")


def evaluate(config: SLA, layout: BlockLayout, heads: int) -> Chosen:
    """Count the token pairs of the sparse branch; the linear one is small beside them."""
    keys = replace(layout, tile=config.key_tile)
    blocks = keys.num_video_blocks
    kept = truncated_top_k(blocks, config.topk_ratio)
    density = top_k_density(keys, kept)
    detail = f"{kept} of {blocks} key blocks"
    return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density, detail)


def arguments(
    config: SLA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> tuple[Any, ...]:
    """Return the static arguments of the op."""
    tiles = (list(tile), list(config.key_tile))
    numbers = (float(config.topk_ratio), config.feature_map)
    return (grid, *tiles, text_before, text_after, *numbers)


def _lower(
    config: SLA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> OpCall:
    static = arguments(config, tile, grid, text_before, text_after)
    return OpCall(torch.ops.compiled_sparse.sla.default, static, RUNTIME_INPUTS)


MECHANISM = Mechanism(
    config=SLA,
    capabilities=KERNEL_CAPABILITIES,
    evaluate=evaluate,
    lower=_lower,
    reference=sla_attention,
)
