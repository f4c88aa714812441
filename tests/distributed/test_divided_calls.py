"""Models whose sequence is divided among processes: rewritten, and equal to one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from processes import values
from sharded import shard_of
from sharded import whole_of
from torch import Tensor
from torch import distributed
from torch import nn

import compiled_sparse as cs

GRID = (5, 6, 4)


class Attention(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _try() -> Any:
    torch.manual_seed(0)
    size, rank = distributed.get_world_size(), distributed.get_rank()
    model = Attention(3, 24)
    x = torch.randn(2, 120 + 7, 24)
    policy = cs.STA(window_thw=(3, 3, 1), tile_thw=(2, 2, 2))
    text = cs.Text(after=7)
    local = shard_of(x[:, None], rank, size, text)[:, 0].requires_grad_()
    compiled = torch.compile(
        model,
        backend="compiled_sparse",
        fullgraph=True,
        options={"policy": policy, "inner": "aot_eager", "strict": True},
    )
    with cs.metadata(grid_thw=GRID, text=text, mesh=distributed.group.WORLD):
        out = compiled(local)
    out.sum().backward()
    return out.detach()


def test_it() -> None:
    outs = values(2, _try)
    print(whole_of([o[:, None] for o in outs], 120, cs.Text(after=7)).shape)
