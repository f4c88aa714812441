"""Sliding-window block attention, registered: config, op and reference in one record."""

from __future__ import annotations

from typing import Any

import torch

from compiled_sparse.config import SWBA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import swba as _op  # noqa: F401 - defines the op
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.pattern import swba_density
from compiled_sparse.reference.swba import swba_token_mask
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall


def _evaluate(config: SWBA, layout: BlockLayout, heads: int) -> Chosen:
    density = swba_density(layout.num_tokens, config.block, config.window)
    return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density)


def _lower(
    config: SWBA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> OpCall:
    (length,) = grid
    return OpCall(torch.ops.compiled_sparse.swba.default, (length, config.block, config.window))


MECHANISM = Mechanism(
    config=SWBA,
    capabilities=KERNEL_CAPABILITIES,
    evaluate=_evaluate,
    lower=_lower,
    token_mask=swba_token_mask,
)
