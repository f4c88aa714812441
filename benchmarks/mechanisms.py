"""Every mechanism on one shape, at about the same density, beside dense SDPA and flex_attention.

Bound: dense work times the density that the lists really have. Queries, keys and values are made
up, smooth over the grid with noise (`compiled_sparse.synthetic`); errors against dense attention
are of that and say nothing about a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import compiled_sparse as cs
from benchmarks.timing import backward_medians
from benchmarks.timing import interleaved_medians
from benchmarks.timing import ratios
from compiled_sparse.block_lists import BlockLists
from compiled_sparse.block_lists import block_lists
from compiled_sparse.config import MechanismConfig
from compiled_sparse.flex import flex_block_mask
from compiled_sparse.flex import has_full_blocks
from compiled_sparse.synthetic import made_up_tokens

HEADS, HEAD_DIM, GRID = 4, 64, (8, 24, 40)

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A mechanism, and which of its learned parts is given."""

    config: MechanismConfig
    gate: bool = False
    projection: bool = False
    trains: bool = True


_TOP_K: dict[str, Any] = {"moba_select_mode": "topk"}
CASES = {
    "STA": Case(cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 6, 8))),
    "VSA, gated": Case(cs.VSA(sparsity=0.9), gate=True),
    "VSA, sparse branch alone": Case(cs.VSA(sparsity=0.9)),
    "SLA": Case(cs.SLA(topk_ratio=0.1), projection=True),
    "SLA, boxes": Case(
        cs.SLA(topk_ratio=0.1, block_q=(4, 8, 4), block_k=(4, 4, 4)), projection=True
    ),
    "SageSLA": Case(cs.SageSLA(topk_ratio=0.1), projection=True, trains=False),
    "SWBA": Case(cs.SWBA(block=256, window=3)),
    "VMoBA, temporal": Case(
        cs.VMoBA(temporal_chunk_size=1, temporal_topk=2, spatial_layer=0, st_layer=0, **_TOP_K)
    ),
    "VMoBA, spatial": Case(
        cs.VMoBA(spatial_chunk_size=(6, 8), spatial_topk=2, temporal_layer=0, st_layer=0, **_TOP_K)
    ),
    "VMoBA, spatio-temporal": Case(
        cs.VMoBA(st_chunk_size=(4, 6, 8), st_topk=4, temporal_layer=0, spatial_layer=0, **_TOP_K)
    ),
}
"""Blocks that divide the grid, so that flex_attention can be given each of the lists.

A temporal chunk cannot be less than a frame, an eighth here.
"""


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all mechanisms."""
    return [measure(name, case, GRID, rounds) for name, case in CASES.items()]


def measure(name: str, case: Case, grid: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Measure one mechanism, its learned parts included; the error is that without them.

    Gate and projection are zero before training, and nothing stands for trained ones here.

    Args:
        name: What to call the case.
        case: The mechanism.
        grid: Token grid.
        rounds: How often each function is timed.
    """
    torch._dynamo.reset()
    inputs = _inputs(grid)
    q, k, v = inputs[:3]
    lists = block_lists(case.config, q, k, grid_thw=grid)
    assert lists is not None
    functions: dict[str, Function] = {"dense": _dense, "compiled": _compiled(case, grid)}
    forward = dict(functions)
    if isinstance(lists, BlockLists) and has_full_blocks(lists):
        forward["flex_attention"] = _flex(lists)
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(q, k, v)
        error = cs.attention(q, k, v, case.config, grid_thw=grid) - expected
        seconds = interleaved_medians(
            {key: lambda f=f: f(*inputs) for key, f in forward.items()},  # type: ignore[misc]
            rounds,
        )
    density = lists.density
    record: dict[str, Any] = {
        "case": name,
        "config": case.config.describe(),
        "grid": list(grid),
        "density": density,
        "limit": 1 / density,
        "relative_error": float(error.norm() / expected.norm()),
        "forward": ratios(seconds, density),
    }
    if case.trains:
        record["backward"] = ratios(backward_medians(functions, inputs, rounds), density)
    return record


def _inputs(grid: tuple[int, ...]) -> list[Tensor]:
    """Queries, keys, values, a gate, and weight and bias of a projection."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    gate = random(1, HEADS, math.prod(grid), HEAD_DIM)
    projection = random(HEAD_DIM, HEAD_DIM) / HEAD_DIM, random(HEAD_DIM)
    return [*made_up_tokens(grid, HEADS, HEAD_DIM), gate, *projection]


def _dense(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _compiled(case: Case, grid: tuple[int, ...]) -> Function:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return cs.attention(
            q,
            k,
            v,
            case.config,
            grid_thw=grid,
            gate=gate if case.gate else None,
            proj=(weight, bias) if case.projection else None,
        )

    compiled: Function = torch.compile(attend, fullgraph=True, dynamic=False)
    return compiled


def _flex(lists: BlockLists) -> Function:
    """The lists alone, as full blocks of tokens that were moved outside the timing."""
    mask = flex_block_mask(lists, HEADS)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v, *learned: compiled(q, k, v, block_mask=mask)
