"""Sparse-linear attention, both branches, beside dense SDPA and flex_attention.

Bound: dense work times density, the token pairs of the sparse branch, 12 of 128 key blocks. The
linear branch has to fit into what is lost beside it; its own time and share are reported.
"""

from __future__ import annotations

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
from compiled_sparse.layout import ceil_div
from compiled_sparse.ops import block_sparse_attention
from compiled_sparse.ops.linear_attention import linear_attention
from compiled_sparse.synthetic import smooth_tokens

HEADS, RATIO, BLOCK_Q, BLOCK_K = 4, 0.1, 128, 64
LENGTHS = (8192, 8150)
"""A length that the blocks divide, and one that they do not."""

GRID = (16, 16, 32)
BOXES = {"block_q": (4, 8, 4), "block_k": (4, 4, 4)}
"""As many tokens in a box as in a run."""

Function = Callable[..., Tensor]


def _inputs(length: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, and weight and bias of a projection that is no longer zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = [random(1, HEADS, length, head_dim).to(dtype) for _ in range(3)]
    return [*tokens, random(head_dim, head_dim) / head_dim, random(head_dim)]


def _lists(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    _, lut, topk = cs.get_block_map(q, k, RATIO, BLOCK_Q, BLOCK_K)
    return lut.int(), torch.full(lut.shape[:3], topk, dtype=torch.int32)


def _functions(lists: tuple[Tensor, Tensor], length: int) -> dict[str, Function]:
    config = cs.SLA(topk_ratio=RATIO, block_q=BLOCK_Q, block_k=BLOCK_K)
    tiles = {"grid": (length,), "q_tile": (BLOCK_Q,), "kv_tile": (BLOCK_K,)}

    def whole(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cs.attention(q, k, v, config, proj=(weight, bias))

    def linear(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_attention(q, k, v, None, "softmax", weight, bias)

    def kernel(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, *lists, **tiles)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    return {
        "dense": dense,
        "eager": whole,
        "compiled": torch.compile(whole, fullgraph=True, dynamic=False),
        "kernel_op": kernel,
        "linear_eager": linear,
        "linear_compiled": torch.compile(linear, fullgraph=True, dynamic=False),
    }


def _flex(lists: tuple[Tensor, Tensor], length: int) -> Function:
    """The sparse branch alone."""
    indices, counts = lists
    blocks = ceil_div(length, BLOCK_K)
    rest = torch.zeros(*indices.shape[:-1], blocks - indices.shape[3], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros(*indices.shape[:-1], blocks, dtype=torch.int32),
        counts,
        torch.cat([indices, rest], dim=-1),
        BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
    )
    compiled = torch.compile(flex_attention)
    return lambda q, k, v, weight, bias: compiled(q, k, v, block_mask=mask)


def measure(length: int, head_dim: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure forward and backward of one shape."""
    torch._dynamo.reset()
    inputs = _inputs(length, head_dim, dtype)
    lists = _lists(inputs[0], inputs[1])
    functions = _functions(lists, length)
    sage = cs.SageSLA(topk_ratio=RATIO, block_q=BLOCK_Q, block_k=BLOCK_K)
    forward = functions | {
        "sage_eager": lambda q, k, v, *proj: cs.attention(q, k, v, sage, proj=(proj[0], proj[1]))
    }
    if length % BLOCK_Q == 0:
        forward["flex_attention"] = _flex(lists, length)
    with torch.no_grad():
        seconds = interleaved_medians(
            {name: lambda f=f: f(*inputs) for name, f in forward.items()},  # type: ignore[misc]
            rounds,
        )
    density = lists[0].shape[3] / ceil_div(length, BLOCK_K)
    return {
        "case": f"N{length} D{head_dim} {str(dtype).removeprefix('torch.')}",
        "density": density,
        "limit": 1 / density,
        "forward": _ratios(seconds, density),
        "backward": _ratios(backward_medians(functions, inputs, rounds), density),
    }


def _ratios(seconds: dict[str, float], density: float) -> dict[str, Any]:
    share = {name: seconds[f"linear_{name}"] / seconds[name] for name in ("eager", "compiled")}
    return {**ratios(seconds, density), "share_of_linear_branch": share}


def compare_blocks(head_dim: int) -> dict[str, Any]:
    """Compare runs of tokens with boxes of the grid: what they leave out of dense attention.

    Queries and keys vary smoothly over the grid, as features of a video do, with noise on top.
    """
    generator = torch.Generator().manual_seed(0)

    q, k, v = (smooth_tokens(GRID, HEADS, head_dim, generator) for _ in range(3))
    result: dict[str, Any] = {"case": f"runs and boxes, grid 16x16x32 D{head_dim}"}
    everything = cs.SLA(topk_ratio=1.0, proj=None)
    expected, dense_lse = cs.attention(q, k, v, everything, return_lse=True)
    blocks = {"runs": {"block_q": BLOCK_Q, "block_k": BLOCK_K}, "boxes": BOXES}
    for name, sides in blocks.items():
        config = cs.SLA(topk_ratio=RATIO, proj=None, **sides)  # type: ignore[arg-type]
        out, lse = cs.attention(q, k, v, config, grid_thw=GRID, return_lse=True)
        error = (out - expected).norm() / expected.norm()
        mass = (lse - dense_lse).exp().mean()
        result[name] = {"relative_error": float(error), "captured_mass": float(mass)}
    return result


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all shapes of the suite."""
    timed = [
        measure(length, head_dim, dtype, rounds)
        for length in LENGTHS
        for head_dim in (64, 128)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return timed + [compare_blocks(head_dim) for head_dim in (64, 128)]
