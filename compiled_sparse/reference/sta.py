"""Sliding tile attention, rule by rule: which tokens see which."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.config import STA


def sta_token_mask(
    config: STA, queries: Tensor, keys: Tensor, grid: tuple[int, ...], tile: tuple[int, ...]
) -> Tensor:
    """Return which keys each query sees: text all, and all text; video its window of tiles.

    Args:
        config: Windows, one for all heads or one per head; of a table its first row.
        queries: Query positions counted from the first video token; text is negative or past it.
        keys: Key positions, likewise.
        grid: Tokens per axis.
        tile: Tokens per axis of a tile.

    Returns:
        bool [1 or heads, queries, keys].
    """
    return torch.stack([_mask(queries, keys, grid, tile, window) for window in config.at().windows])


def _mask(
    queries: Tensor,
    keys: Tensor,
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    window: tuple[int, ...],
) -> Tensor:
    num_video = 1
    for extent in grid:
        num_video *= extent
    query_is_text = (queries < 0) | (queries >= num_video)
    key_is_text = (keys < 0) | (keys >= num_video)
    visible = torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    stride = num_video
    for extent, side, nominal in zip(grid, tile, window, strict=True):
        stride //= extent
        query_tile = (queries // stride % extent // side)[:, None]
        key_tile = (keys // stride % extent // side)[None, :]
        visible &= _axis_visible(query_tile, key_tile, -(-extent // side), nominal)
    return visible | query_is_text[:, None] | key_is_text[None, :]


def _axis_visible(query_tile: Tensor, key_tile: Tensor, num_tiles: int, nominal: int) -> Tensor:
    half = nominal // 2
    width = 2 * half + 1
    if width >= num_tiles:
        return (key_tile >= 0) & (query_tile >= 0)
    first = (query_tile - half).clamp(min=0, max=num_tiles - width)
    return (key_tile >= first) & (key_tile < first + width)
