"""Video sparse attention, registered: config, op and reference in one record."""

from __future__ import annotations

from typing import Any

import torch

from compiled_sparse.config_vsa import UNGATED
from compiled_sparse.config_vsa import VSA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import vsa as _op  # noqa: F401 - defines the op
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.pattern import top_k_density
from compiled_sparse.reference.vsa import vsa_attention
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall
from compiled_sparse.sparsity import num_selected


def _evaluate(config: VSA, layout: BlockLayout, heads: int) -> Chosen:
    tiles = layout.num_video_blocks
    kept = num_selected(tiles, config.sparsity)
    density = top_k_density(layout, kept)
    detail = f"{kept} of {tiles} tiles"
    return Chosen(config, layout.tile, density, KERNEL_EFFICIENCY / density, detail)


def _lower(
    config: VSA, tile: tuple[int, ...], grid: list[Any], text_before: Any, text_after: Any
) -> OpCall:
    is_ungated = config.gate == UNGATED
    arguments = (grid, list(tile), text_before, text_after, float(config.sparsity), is_ungated)
    op = torch.ops.compiled_sparse.vsa.default
    return OpCall(op, arguments, ("given_sparsity", "gate"))


MECHANISM = Mechanism(
    config=VSA,
    capabilities=KERNEL_CAPABILITIES,
    evaluate=_evaluate,
    lower=_lower,
    reference=vsa_attention,
)
