"""What blocks, windows and attention mean, by naive loops; shares no code with the package."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Extents = Sequence[int]


def blocks(grid: Extents, tile: Extents, before: int = 0, after: int = 0) -> list[list[int]]:
    """Return the tokens of every block: runs of text, tiles in raster order, runs of text."""
    size = 1
    for side in tile:
        size *= side
    num_video = 1
    for extent in grid:
        num_video *= extent
    tiles: dict[tuple[int, ...], list[int]] = {}
    for token, position in enumerate(itertools.product(*(range(extent) for extent in grid))):
        key = tuple(p // side for p, side in zip(position, tile, strict=True))
        tiles.setdefault(key, []).append(before + token)
    video = [tiles[key] for key in sorted(tiles)]
    return [*_runs(0, before, size), *video, *_runs(before + num_video, after, size)]


def _runs(start: int, count: int, size: int) -> list[list[int]]:
    tokens = list(range(start, start + count))
    return [tokens[i : i + size] for i in range(0, count, size)]


def window(num_tiles: int, nominal: int, query_tile: int) -> list[int]:
    """Return the key tiles a query tile sees on one axis."""
    half = nominal // 2
    width = 2 * half + 1
    if width >= num_tiles:
        return list(range(num_tiles))
    start = query_tile - half
    while start < 0:
        start += 1
    while start + width > num_tiles:
        start -= 1
    return list(range(start, start + width))


def sta_mask(
    grid: Extents, tile: Extents, windows: Sequence[Extents], before: int = 0, after: int = 0
) -> Tensor:
    """Return which keys each query sees under sliding tile attention, [windows, L, L]."""
    positions = list(itertools.product(*(range(extent) for extent in grid)))
    length = before + len(positions) + after
    counts = [(extent + side - 1) // side for extent, side in zip(grid, tile, strict=True)]
    masks = []
    for nominal in windows:
        seen = [
            [set(window(count, k, query)) for query in range(count)]
            for count, k in zip(counts, nominal, strict=True)
        ]
        mask = [[True] * length for _ in range(length)]
        for i, query in enumerate(positions):
            allowed = [seen[a][p // tile[a]] for a, p in enumerate(query)]
            row = mask[before + i]
            for j, key in enumerate(positions):
                row[before + j] = all(p // tile[a] in allowed[a] for a, p in enumerate(key))
        masks.append(mask)
    return torch.tensor(masks)


def list_mask(
    block_indices: Tensor,
    block_counts: Tensor,
    q_blocks: list[list[int]],
    kv_blocks: list[list[int]],
) -> Tensor:
    """Expand block lists to which keys each query sees, [batch or 1, heads or 1, Lq, Lk]."""
    batch, heads = block_counts.shape[:2]
    q_length, k_length = (sum(len(block) for block in each) for each in (q_blocks, kv_blocks))
    indices, counts = block_indices.tolist(), block_counts.tolist()
    mask = [
        [[[False] * k_length for _ in range(q_length)] for _ in range(heads)] for _ in range(batch)
    ]
    for b, h, row in itertools.product(range(batch), range(heads), range(len(q_blocks))):
        for block in indices[b][h][row][: counts[b][h][row]]:
            for query, key in itertools.product(q_blocks[row], kv_blocks[block]):
                mask[b][h][query][key] = True
    return torch.tensor(mask)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return masked attention and its log-sum-exp in the dtype of the inputs, differentiable.

    A query without a visible key gives zeros and -inf.
    """
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    groups = q.shape[1] // k.shape[1]
    keys = torch.stack([k[:, h // groups] for h in range(q.shape[1])], dim=1)
    values = torch.stack([v[:, h // groups] for h in range(q.shape[1])], dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.where(mask, (q @ keys.transpose(-1, -2)) * scale, float("-inf"))
    empty = ~mask.any(dim=-1, keepdim=True)
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = torch.where(mask, (scores - torch.where(empty, 0.0, top)).exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), top + total.log())
    return weights / total @ values, lse[..., 0]
