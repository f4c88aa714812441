"""Mixture-of-block attention, selection included, beside dense SDPA and flex_attention.

Bound: dense work times the density of what is really selected. Queries and keys are made up, smooth
over the grid with noise; flex_attention looks each pair up in the same selection, and skips blocks
of 128 by 128 in which nothing is selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from compiled_sparse.block_lists import ChunkSelection
from compiled_sparse.block_lists import block_lists
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import chunk_sparse_attention
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.synthetic import made_up_tokens

HEADS, GRID = 4, (8, 24, 40)
SHAPES = ((64, torch.float32), (64, torch.bfloat16), (128, torch.float32))

_TOP_K: dict[str, Any] = {"moba_select_mode": "topk"}
CASES = {
    "temporal 2 of 4": cs.VMoBA(temporal_topk=2, spatial_layer=0, st_layer=0, **_TOP_K),
    "spatial 6x8, 3 of 20": cs.VMoBA(
        spatial_chunk_size=(6, 8), spatial_topk=3, temporal_layer=0, st_layer=0, **_TOP_K
    ),
    "st 4x6x8, 6 of 40": cs.VMoBA(
        st_chunk_size=(4, 6, 8), st_topk=6, temporal_layer=0, spatial_layer=0, **_TOP_K
    ),
    "st 4x6x4 as published, 12 of 80": cs.VMoBA(
        st_topk=12, temporal_layer=0, spatial_layer=0, **_TOP_K
    ),
    "st 4x6x8, threshold 0.25": cs.VMoBA(
        st_chunk_size=(4, 6, 8), temporal_layer=0, spatial_layer=0
    ),
}

Function = Callable[..., Tensor]


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all chunks in all shapes."""
    return [
        measure(name, config, head_dim, dtype, rounds)
        for head_dim, dtype in SHAPES
        for name, config in CASES.items()
    ]


def measure(
    name: str, config: cs.VMoBA, head_dim: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Measure forward and backward of one config.

    Args:
        name: What to call it.
        config: The config, of one kind of chunks.
        head_dim: Channels of a head.
        dtype: Dtype of queries, keys and values.
        rounds: How often each function is timed.
    """
    torch._dynamo.reset()
    inputs = [each.to(dtype) for each in made_up_tokens(GRID, HEADS, head_dim)]
    selection = block_lists(config, *inputs[:2], grid_thw=GRID)
    assert isinstance(selection, ChunkSelection)
    density = selection.density
    functions = _functions(config, selection)
    forward = functions | {"selection": _select(config)}
    if dtype == torch.float32 and head_dim == 64:
        forward["flex_attention"] = _flex(selection)
    with torch.no_grad():
        seconds = interleaved_medians(
            {key: lambda f=f: f(*inputs) for key, f in forward.items()},  # type: ignore[misc]
            rounds,
        )
    share = seconds.pop("selection") / seconds["eager"]
    return {
        "case": f"{name}, D{head_dim} {str(dtype).removeprefix('torch.')}",
        "config": config.describe(),
        "density": density,
        "limit": 1 / density,
        "forward": {**ratios(seconds, density), "share_of_selection": share},
        "backward": ratios(backward_medians(functions, inputs, rounds), density),
    }


def _functions(config: cs.VMoBA, selection: ChunkSelection) -> dict[str, Function]:
    layout = selection.chunks

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cs.attention(q, k, v, config, grid_thw=GRID)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        geometry = {"grid": layout.grid, "tile": layout.tile}
        return chunk_sparse_attention(q, k, v, selection.selected, **geometry)[0]

    return {"dense": F.scaled_dot_product_attention, "eager": whole, "kernel_op": kernel}


def _select(config: cs.VMoBA) -> Function:
    grid, tile = config.resolve_grid(GRID), config.resolve_tile(GRID)
    rule = (config.moba_select_mode, config.moba_threshold_type, config.topk)

    def select(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        selected: Tensor = torch.ops.compiled_sparse.select_chunks(
            q, k, None, grid, tile, 0, 0, *rule, config.moba_threshold
        )
        return selected

    return select


def _flex(selection: ChunkSelection) -> Function:
    """The same selection, looked up pair by pair."""
    chunk = _chunk_of_token(selection.chunks)
    seen = torch.stack([selection.mask(head) for head in range(HEADS)])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[head, query, chunk[key]]

    length = math.prod(GRID)
    mask = create_block_mask(sees, 1, HEADS, length, length, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _chunk_of_token(layout: BlockLayout) -> Tensor:
    slots = block_tokens(layout)
    chunk = torch.empty(layout.num_tokens, dtype=torch.int64)
    for number, tokens in enumerate(slots):
        chunk[tokens[tokens >= 0].long()] = number
    return chunk
