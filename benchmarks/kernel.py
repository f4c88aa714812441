"""The kernel op on random block lists, forward and backward, beside dense SDPA and flex_attention.

Bound: a list of K of N blocks does K / N of the dense work, so the limit is N / K times dense SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.timing import interleaved_medians
from benchmarks.timing import ratios
from compiled_sparse.ops import block_sparse_attention

BATCH, HEADS, TOKENS, BLOCK, SELECTED = 1, 4, 4096, 64, 6
NUM_BLOCKS = TOKENS // BLOCK
LIMIT = NUM_BLOCKS / SELECTED


def random_lists(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return lists of `SELECTED` distinct random key blocks for every query block."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(BATCH, HEADS, NUM_BLOCKS, NUM_BLOCKS, generator=generator)
    indices = scores.argsort(-1)[..., :SELECTED].sort(-1).values.to(torch.int32)
    return indices.contiguous(), torch.full(indices.shape[:-1], SELECTED, dtype=torch.int32)


def _inputs(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, HEADS, TOKENS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v


def _sparse(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    out, _ = block_sparse_attention(
        q, k, v, indices, counts, grid=(TOKENS,), q_tile=(BLOCK,), kv_tile=(BLOCK,)
    )
    return out


def _flex_mask(indices: Tensor, counts: Tensor) -> BlockMask:
    """The same lists as full blocks: no mask function is evaluated inside a block."""
    none = torch.zeros_like(counts)
    rest = torch.zeros(*indices.shape[:-1], NUM_BLOCKS - SELECTED, dtype=torch.int32)
    padded = torch.cat([indices, rest], dim=-1)
    return BlockMask.from_kv_blocks(
        none, torch.zeros_like(padded), counts, padded, BLOCK_SIZE=BLOCK
    )


def forward(head_dim: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure one forward shape."""
    q, k, v = _inputs(head_dim, dtype)
    indices, counts = random_lists()
    mask = _flex_mask(indices, counts)
    compiled_flex = torch.compile(flex_attention)
    with torch.no_grad():
        error = (_sparse(q, k, v, indices, counts) - compiled_flex(q, k, v, block_mask=mask)).abs()
        seconds = interleaved_medians(
            {
                "dense": lambda: F.scaled_dot_product_attention(q, k, v),
                "flex_attention": lambda: compiled_flex(q, k, v, block_mask=mask),
                "compiled_sparse": lambda: _sparse(q, k, v, indices, counts),
            },
            rounds,
        )
    return _record("forward", head_dim, dtype, seconds) | {
        "max_difference_from_flex": float(error.max())
    }


def backward(head_dim: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure one backward shape; the forward is not timed."""
    leaves = [tensor.requires_grad_() for tensor in _inputs(head_dim, dtype)]
    indices, counts = random_lists()
    dense = F.scaled_dot_product_attention(*leaves)
    sparse = _sparse(leaves[0], leaves[1], leaves[2], indices, counts)
    grad = torch.randn_like(dense)
    seconds = interleaved_medians(
        {
            "dense": lambda: torch.autograd.grad(dense, leaves, grad, retain_graph=True),
            "compiled_sparse": lambda: torch.autograd.grad(sparse, leaves, grad, retain_graph=True),
        },
        rounds,
    )
    return _record("backward", head_dim, dtype, seconds)


def _record(
    direction: str, head_dim: int, dtype: torch.dtype, seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "case": f"{direction} D{head_dim} {str(dtype).removeprefix('torch.')}",
        "limit": LIMIT,
        **ratios(seconds, 1 / LIMIT),
    }


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all shapes of the kernel suite."""
    cases = [(d, dtype) for d in (64, 128) for dtype in (torch.float32, torch.bfloat16)]
    results = [forward(head_dim, dtype, rounds) for head_dim, dtype in cases]
    return results + [backward(head_dim, dtype, rounds) for head_dim, dtype in cases]
