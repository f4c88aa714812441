"""Models explained as one of two ranks that a video is divided among, without the other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from process_groups import lone_group
from torch import Tensor
from torch import distributed
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.report import Decision

GRID = (4, 6, 5)
RUN = 60
"""Tokens of each rank."""
STA = cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 2))

Attend = Callable[..., Tensor]


class Single(nn.Module):
    """One attention among 2 heads of 8 channels, projected from what it is given.

    Args:
        attend: Called with queries, keys and values [batch, heads, length, 8].
    """

    def __init__(self, attend: Attend = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.attend = attend

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from one sequence to another, by default to itself."""
        context = x if context is None else context
        q, k, v = (
            layer(each).unflatten(2, (2, 8)).transpose(1, 2)
            for layer, each in zip(self.project, (x, context, context), strict=True)
        )
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Refined(nn.Module):
    """Video that attends to text, which attends among itself before."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner, self.cross = Single(), Single()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Refine the text, then attend to it."""
        return self.cross(x, self.refiner(text))


def with_keys_gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ring attention by an all-gather of the keys and values of two ranks."""
    ops = torch.ops._c10d_functional
    whole = (
        ops.wait_tensor(ops.all_gather_into_tensor(each.contiguous(), 2, "0")) for each in (k, v)
    )
    keys, values = (torch.cat(each.chunk(2), 2) for each in whole)
    return F.scaled_dot_product_attention(q, keys, values)


def moba_over_heads(kind: str) -> MechanismConfig:
    """Return a config whose heads share what they select; `kind` is "overall" or "block"."""
    config = cs.VMoBA(moba_select_mode="threshold", moba_threshold_type=kind)
    return config.for_layer(0)


def sequence(length: int = RUN) -> Tensor:
    """Return random tokens [1, length, 16]."""
    return torch.randn(1, length, 16)


def explained(
    model: Callable[..., Any],
    *inputs: Any,
    policy: Any = STA,
    text: cs.Text | None = None,
    grid: tuple[int, ...] = GRID,
    place: tuple[int, int] = (0, 2),
    ring: bool = False,
) -> tuple[Decision, ...]:
    """Return what is decided about each call where tokens are divided; raise what stops that.

    Args:
        model: What makes the calls.
        inputs: Its inputs.
        policy: The policy.
        text: What `cs.metadata` is told about text.
        grid: Token grid of the whole video.
        place: This process's rank, and how many there are.
        ring: Whether keys go round instead of heads being divided.
    """
    with lone_group(place[1], rank=place[0]):
        torch._dynamo.reset()
        name = "ring" if ring else "ulysses"
        mesh = distributed.init_device_mesh("cpu", (place[1],), mesh_dim_names=(name,))
        with cs.metadata(grid_thw=grid, text=text, mesh=mesh):
            try:
                return cs.explain(model, *inputs, policy=policy).sites
            except BackendCompilerFailed as error:  # what Dynamo makes of it
                raise error.inner_exception from None
