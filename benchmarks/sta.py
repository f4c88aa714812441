"""Sliding tile attention over a video grid, beside dense SDPA and flex_attention.

Bound: dense work times density. All heads and batch entries share one list.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention

import compiled_sparse as cs
from benchmarks.timing import backward_medians
from benchmarks.timing import interleaved_medians
from benchmarks.timing import ratios
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.reference.attention import token_mask

HEADS = 4
CASES = (
    # grid, tile, window: a grid the tile divides, one it does not, and the default tile
    ((8, 30, 32), (4, 5, 4), (1, 3, 3)),
    ((9, 28, 31), (4, 5, 4), (3, 3, 3)),
    ((12, 24, 32), (6, 8, 8), (1, 1, 3)),
)


def _flex(grid: tuple[int, ...], config: MechanismConfig) -> Any:
    length = math.prod(grid)
    mask = token_mask(config, slice(None), length, length, grid, cs.Text())[0, 0]
    block_mask = create_block_mask(
        lambda _b, _h, query, key: mask[query, key], None, None, length, length, device="cpu"
    )
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def measure(
    config: MechanismConfig, grid: tuple[int, ...], density: float, head_dim: int, rounds: int
) -> dict[str, Any]:
    """Measure forward and backward of a mechanism with static lists on one grid."""
    length = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, head_dim, generator=generator) for _ in range(3))
    flex = _flex(grid, config)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cs.attention(q, k, v, config, grid_thw=grid)

    with torch.no_grad():
        seconds = interleaved_medians(
            {
                "dense": lambda: F.scaled_dot_product_attention(q, k, v),
                "flex_attention": lambda: flex(q, k, v),
                "compiled_sparse": lambda: sparse(q, k, v),
            },
            rounds,
        )
    trained = {"dense": F.scaled_dot_product_attention, "compiled_sparse": sparse}
    seconds_backward = backward_medians(trained, (q, k, v), rounds)
    name = f"grid {'x'.join(map(str, grid))} {config.describe()} D{head_dim}"
    return {
        "case": name,
        "density": density,
        "limit": 1 / density,
        "forward": ratios(seconds, density),
        "backward": ratios(seconds_backward, density),
    }


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all grids of the sliding tile suite."""
    results = []
    for grid, tile, window in CASES:
        config = cs.STA(window_thw=window, tile_thw=tile)
        density = sta_density(BlockLayout(grid, tile), config.windows)
        results += [measure(config, grid, density, head_dim, rounds) for head_dim in (64, 128)]
    return results
