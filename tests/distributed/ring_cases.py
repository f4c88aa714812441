"""One attention on one process and on a ring of several, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.ring import ring_attention
from compiled_sparse.layout import Text
from compiled_sparse.sharding import SequenceGroup

Found = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class RingCase:
    """What is computed; tensors follow from it, the same in every process."""

    config: MechanismConfig
    grid: tuple[int, ...]
    text: Text = Text()
    heads: int = 3
    key_heads: int = 3
    batch: int = 2
    dtype: torch.dtype = torch.float64
    hidden: tuple[int, ...] = ()
    """Keys of the whole sequence that the mask hides."""
    scale: float | None = None

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text.before + self.text.after

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """Return q, k, v and the weights of the loss, over the whole sequence."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        q, k, v, weights = (
            torch.randn(self.batch, each, self.length, 8, generator=generator).to(self.dtype)
            for each in heads
        )
        return [q, k, v], weights

    def key_mask(self) -> Tensor | None:
        if not self.hidden:
            return None
        mask = torch.ones(self.batch, self.length, dtype=torch.bool)
        mask[0, list(self.hidden)] = False
        return mask

    def share(self, x: Tensor, rank: int, size: int) -> Tensor:
        """Return what a rank holds of [batch, heads, length, ...]."""
        n = math.prod(self.grid) // size
        before, behind = self.text.before, x.shape[2] - self.text.after
        start = before + rank * n
        return torch.cat([x[:, :, :before], x[:, :, start : start + n], x[:, :, behind:]], dim=2)

    def joined(self, parts: list[Tensor], *, sums_text: bool) -> Tensor:
        """Return the whole of what ranks hold; of text the sum over ranks, or what all have."""
        before, after = self.text.before, self.text.after
        n = math.prod(self.grid) // len(parts)
        video = [part[:, :, before : before + n] for part in parts]
        fronts = torch.stack([part[:, :, :before] for part in parts])
        backs = torch.stack([part[:, :, before + n :] for part in parts])
        assert backs.shape[3] == after
        texts = [each.sum(0) if sums_text else each[0] for each in (fronts, backs)]
        return torch.cat([texts[0], *video, texts[1]], dim=2)


def group() -> SequenceGroup:
    world = distributed.group.WORLD
    assert world is not None
    return SequenceGroup(world.group_name, distributed.get_world_size(), distributed.get_rank())


def in_ring(case: RingCase, compiler: str | None = None) -> Found:
    """Return this rank's output and gradients; the loss counts text on the first rank only."""
    ring = group()
    inputs, weights = case.tensors()
    q, k, v = (case.share(x, ring.rank, ring.size).requires_grad_() for x in inputs)
    weights = case.share(weights, ring.rank, ring.size)
    if ring.rank:
        weights[:, :, : case.text.before] = 0.0
        weights[:, :, weights.shape[2] - case.text.after :] = 0.0

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            case.config,
            group=ring,
            grid_thw=case.grid,
            text=case.text,
            key_mask=case.key_mask(),
            scale=case.scale,
        )

    if compiler is not None:
        attend = torch.compile(attend, backend=compiler, fullgraph=True)
    out = attend(q, k, v)
    return out.detach(), list(torch.autograd.grad(out, (q, k, v), weights))


def in_rings(cases: list[RingCase], compiler: str | None = None) -> list[Found]:
    """Return `in_ring` of several cases, for the price of one start of processes."""
    return [in_ring(case, compiler) for case in cases]


def on_one(case: RingCase) -> Found:
    """Return the reference's output and gradients over the whole sequence."""
    inputs, weights = case.tensors()
    inputs = [x.requires_grad_() for x in inputs]
    out = cs.reference.attention(
        *inputs,
        case.config,
        grid_thw=case.grid,
        text=case.text,
        key_mask=case.key_mask(),
        scale=case.scale,
    )
    assert isinstance(out, Tensor)
    return out.detach(), list(torch.autograd.grad(out, inputs, weights))
