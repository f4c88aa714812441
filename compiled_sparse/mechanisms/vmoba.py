"""Mixture-of-block attention, registered: config, op and reference in one record."""

from __future__ import annotations

import math
from typing import Any

import torch

from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import vmoba as _op  # noqa: F401 - defines the op
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.pattern import top_k_density
from compiled_sparse.reference.vmoba import vmoba_attention
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall


def _evaluate(config: VMoBA, layout: BlockLayout, heads: int) -> Chosen:
    chunks = layout.num_video_blocks
    kept = _kept(config, chunks)
    density = top_k_density(layout, kept)
    detail = f"{config.kind} chunks, {kept} of {chunks} for a query"
    if config.moba_select_mode == "threshold":
        detail += " if gates were spread evenly"
    return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density, detail)


def _kept(config: VMoBA, chunks: int) -> int:
    """Chunks a query attends to, its own included; under a threshold by a guess at the gates."""
    if config.moba_select_mode == "topk":
        return min(config.topk, chunks) if config.topk > 1 else chunks
    # Of gates spread evenly over 0..1 the largest share x of them sums up to 2x - x^2 of all.
    share = 1 - math.sqrt(max(0.0, 1 - config.moba_threshold))
    return min(chunks, max(2, math.ceil(share * chunks)))


def _lower(
    config: VMoBA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> OpCall:
    sides = list(config.resolve_grid(tuple(grid)))
    rule = (config.moba_select_mode, config.moba_threshold_type, config.topk)
    threshold = float(config.moba_threshold)
    arguments = (sides, list(tile), text_before, text_after, *rule, threshold)
    return OpCall(torch.ops.compiled_sparse.vmoba.default, arguments)


MECHANISM = Mechanism(
    config=VMoBA,
    capabilities=KERNEL_CAPABILITIES,
    evaluate=_evaluate,
    lower=_lower,
    reference=vmoba_attention,
)
