"""A mechanism as another package would bring it: the k blocks whose mean key fits best.

It is found through the entry point that `test_foreign_mechanism.py` writes for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.mechanisms.block_selector import block_selector_mechanism
from compiled_sparse.reference.blocks import block_of_token


@dataclass(frozen=True, kw_only=True)
class TopBlocks(MechanismConfig):
    """Keep a share of the key blocks for each query block, and add a share of the mean value."""

    name: ClassVar[str] = "topblocks"

    keep: float = 0.5
    mean: float = 0.0
    tile_thw: tuple[int, ...] = (2, 3, 2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile_thw", tuple(self.tile_thw))

    @property
    def num_axes(self) -> int:
        """As many as the tile has."""
        return len(self.tile_thw)

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The tile is given."""
        return self.tile_thw

    def kept(self, num_blocks: int) -> int:
        """How many key blocks each query block keeps."""
        return max(1, math.ceil(self.keep * num_blocks))


def select_blocks(
    q: Tensor, k: Tensor, layout: BlockLayout, config: TopBlocks, runtime: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compare mean queries with mean keys, block by block."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = _means(q, layout) @ _means(k, layout).transpose(-1, -2)
    indices = scores.topk(config.kept(layout.num_blocks), dim=-1).indices
    counts = torch.full_like(indices[..., 0], indices.shape[-1])
    return indices.to(torch.int32), counts.to(torch.int32)


def _means(x: Tensor, layout: BlockLayout) -> Tensor:
    blocks = block_of_token(layout).to(x.device)
    sums = x.new_zeros(*x.shape[:2], layout.num_blocks, x.shape[-1]).index_add(2, blocks, x)
    return sums / torch.tensor(layout.block_sizes, device=x.device)[:, None]


def add_mean(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    config: TopBlocks,
    runtime: Mapping[str, Tensor],
) -> Tensor:
    """The extra branch."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return out + config.mean * v.mean(dim=2, keepdim=True)


def density(config: TopBlocks, layout: BlockLayout) -> float:
    """Share of the key blocks each query block keeps."""
    return config.kept(layout.num_blocks) / layout.num_blocks


MECHANISM = block_selector_mechanism(
    "topblocks", TopBlocks, select_blocks, density=density, extra_branch=add_mean
)
