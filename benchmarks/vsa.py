"""Video sparse attention, both branches with a gate, beside dense SDPA and flex_attention.

Bound: dense work times density, the token pairs that the lists really hold. What the whole costs
beyond the kernel op, which means, selection, gate and compressed branch add, is the share outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention

import compiled_sparse as cs
from benchmarks.timing import backward_medians
from benchmarks.timing import interleaved_medians
from benchmarks.timing import ratios
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import tiles_along
from compiled_sparse.ops import block_sparse_attention
from compiled_sparse.ops import tile_mean
from compiled_sparse.ops import top_k_blocks
from compiled_sparse.ops.tiles import spread_over_tokens
from compiled_sparse.sparsity import num_selected

HEADS, SPARSITY, TILE = 4, 0.9, (4, 4, 4)
GRIDS = ((8, 32, 32), (9, 30, 31))
"""Grids of about 8192 tokens: one that the tile divides, one that it does not."""

Function = Callable[..., Tensor]


def _lists(q: Tensor, k: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    means = [tile_mean(each, grid=grid, tile=TILE) for each in (q, k)]
    scores = means[0].float() @ means[1].float().transpose(-1, -2)
    return top_k_blocks(scores, num_selected(scores.shape[-1], SPARSITY))


def _inputs(grid: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and gate that differ from tile to tile.

    Of mere noise small tiles at the border would have the largest means, and be selected.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int) -> Tensor:
        return torch.randn((1, HEADS, tokens, head_dim), generator=generator)

    tiles = math.prod(tiles_along(grid, TILE))
    tensors = []
    for _ in range(4):
        x = spread_over_tokens(random(tiles), grid, TILE) + random(math.prod(grid))
        tensors.append(x.contiguous().to(dtype))
    return tensors


def _density(lists: tuple[Tensor, Tensor], grid: tuple[int, ...]) -> float:
    sizes = torch.tensor(BlockLayout(grid, TILE).block_sizes)
    pairs = sizes[lists[0].long()].sum(-1) * sizes
    return float(pairs.sum()) / (HEADS * math.prod(grid) ** 2)


def _flex(lists: tuple[Tensor, Tensor]) -> Function:
    """The sparse branch alone: its blocks as runs of tokens, which are moved outside the timing."""
    indices, counts = lists
    rest = torch.zeros(*indices.shape[:-1], indices.shape[2] - indices.shape[3], dtype=torch.int32)
    padded = torch.cat([indices, rest], dim=-1)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(padded),
        counts,
        padded,
        BLOCK_SIZE=math.prod(TILE),
    )
    compiled = torch.compile(flex_attention)
    return lambda q, k, v, gate: compiled(q, k, v, block_mask=mask)


def _functions(grid: tuple[int, ...], lists: tuple[Tensor, Tensor]) -> dict[str, Function]:
    config = cs.VSA(sparsity=SPARSITY, tile_thw=TILE)

    def whole(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return cs.attention(q, k, v, config, grid_thw=grid, gate=gate)

    def kernel(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, *lists, grid=grid, q_tile=TILE, kv_tile=TILE)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    compiled: Function = torch.compile(whole, fullgraph=True, dynamic=False)
    return {"dense": dense, "eager": whole, "compiled": compiled, "kernel_op": kernel}


def measure(
    grid: tuple[int, ...], head_dim: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Measure forward and backward of one shape."""
    torch._dynamo.reset()
    length = math.prod(grid)
    inputs = _inputs(grid, head_dim, dtype)
    lists = _lists(inputs[0], inputs[1], grid)
    functions = _functions(grid, lists)
    forward = dict(functions)
    if length == lists[1].shape[2] * math.prod(TILE):
        forward["flex_attention"] = _flex(lists)
    with torch.no_grad():
        seconds = interleaved_medians(
            {name: lambda f=f: f(*inputs) for name, f in forward.items()},  # type: ignore[misc]
            rounds,
        )
    density = _density(lists, grid)
    name = f"grid {'x'.join(map(str, grid))} D{head_dim} {str(dtype).removeprefix('torch.')}"
    return {
        "case": name,
        "density": density,
        "limit": 1 / density,
        "forward": _ratios(seconds, density),
        "backward": _ratios(backward_medians(functions, inputs, rounds), density),
    }


def _ratios(seconds: dict[str, float], density: float) -> dict[str, Any]:
    whole = {name: seconds[name] for name in ("eager", "compiled")}
    outside = {name: 1 - seconds["kernel_op"] / each for name, each in whole.items()}
    return {**ratios(seconds, density), "share_outside_kernel": outside}


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all shapes of the suite."""
    return [
        measure(grid, head_dim, dtype, rounds)
        for grid in GRIDS
        for head_dim in (64, 128)
        for dtype in (torch.float32, torch.bfloat16)
    ]
