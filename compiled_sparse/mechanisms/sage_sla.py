"""Quantised sparse-linear attention, registered: config, op and reference in one record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compiled_sparse.config_sla import SageSLA
from compiled_sparse.mechanisms.sla import RUNTIME_INPUTS
from compiled_sparse.mechanisms.sla import arguments
from compiled_sparse.mechanisms.sla import evaluate
from compiled_sparse.ops import sla as _op  # noqa: F401 - defines the op
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.ops.quantized import DTYPES
from compiled_sparse.ops.quantized import HEAD_DIMS
from compiled_sparse.reference.sla import sla_attention
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall


def _lower(
    config: SageSLA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> OpCall:
    static = (config.values, *arguments(config, tile, grid, text_before, text_after))
    return OpCall(torch.ops.compiled_sparse.sage_sla.default, static, RUNTIME_INPUTS)


MECHANISM = Mechanism(
    config=SageSLA,
    capabilities=replace(
        KERNEL_CAPABILITIES,
        dtypes=frozenset(DTYPES),
        gpu_dtypes=frozenset(DTYPES),
        max_head_dim=max(HEAD_DIMS),
        gpu_max_head_dim=max(HEAD_DIMS),
        head_dims=frozenset(HEAD_DIMS),
        forward_only=True,
    ),
    evaluate=evaluate,
    lower=_lower,
    reference=sla_attention,
)
