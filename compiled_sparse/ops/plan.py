"""Immutable index tensors derived from a layout, built once and cached on integers.

Nothing returned here may be written to: every caller shares the same tensors.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from compiled_sparse.layout import MAX_GRID_AXES
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import effective_width
from compiled_sparse.windows import Window

PADDING = -1
_CACHE_SIZE = 64


@lru_cache(maxsize=_CACHE_SIZE)
def block_tokens(layout: BlockLayout) -> Tensor:
    """Return the raster token index of every slot of every block.

    Valid tokens of a block come first, in raster order; padding slots hold -1.

    Args:
        layout: How the sequence is cut into blocks.

    Returns:
        int32 CPU tensor [num_blocks, block_size].
    """
    before = _text_runs(0, layout.text_before, layout.block_size)
    tiles = _tiles(layout)
    video = torch.where(tiles >= 0, tiles + layout.text_before, tiles)
    after_start = layout.text_before + layout.num_video_tokens
    after = _text_runs(after_start, layout.text_after, layout.block_size)
    return torch.cat([before, video, after]).to(torch.int32)


def _text_runs(start: int, count: int, block_size: int) -> Tensor:
    tokens = torch.arange(start, start + count)
    return F.pad(tokens, (0, -count % block_size), value=PADDING).view(-1, block_size)


def _tiles(layout: BlockLayout) -> Tensor:
    tokens = torch.arange(layout.num_video_tokens).view(layout.grid)
    # F.pad counts from the last axis and pads each at both ends.
    missing = [-extent % side for extent, side in zip(layout.grid, layout.tile, strict=True)]
    tokens = F.pad(tokens, [n for m in reversed(missing) for n in (0, m)], value=PADDING)
    leading = (1,) * (MAX_GRID_AXES - tokens.dim())
    tt, th, tw = (*leading, *layout.tile)
    blocks = rearrange(
        tokens.view(*leading, *tokens.shape),
        "(nt tt) (nh th) (nw tw) -> (nt nh nw) (tt th tw)",
        tt=tt,
        th=th,
        tw=tw,
    )
    order = (blocks < 0).to(torch.int8).argsort(dim=1, stable=True)
    return blocks.gather(1, order)


@lru_cache(maxsize=_CACHE_SIZE)
def tile_of_token(layout: BlockLayout, device: torch.device) -> Tensor:
    """Return the tile that each video token belongs to.

    Args:
        layout: A grid without text.
        device: Where the result lives.

    Returns:
        int32 [tokens of the grid].
    """
    tokens = block_tokens(layout)
    is_token = tokens >= 0
    tiles = torch.arange(layout.num_blocks, dtype=torch.int32)[:, None].expand_as(tokens)
    index = torch.empty(layout.num_video_tokens, dtype=torch.int32)
    index[tokens[is_token]] = tiles[is_token]
    return index.to(device)


@lru_cache(maxsize=_CACHE_SIZE)
def sta_lists(
    layout: BlockLayout, windows: tuple[Window, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the key blocks each query block attends to under sliding tile attention.

    Args:
        layout: How the sequence is cut into blocks.
        windows: One window in tiles for all heads, or one per query head.
        device: Where the lists live.

    Returns:
        `block_indices` int32 [1, 1 or heads, num_blocks, K], ascending within a row and padded with
        0, and `block_counts` int32 [1, 1 or heads, num_blocks].
    """
    per_head = [_sta_rows(layout, window) for window in windows]
    width = max(indices.shape[1] for indices, _ in per_head)
    indices = torch.stack([F.pad(rows, (0, width - rows.shape[1])) for rows, _ in per_head])
    counts = torch.stack([counts for _, counts in per_head])
    return indices[None].to(device, torch.int32), counts[None].to(device, torch.int32)


@lru_cache(maxsize=_CACHE_SIZE)
def swba_lists(length: int, block: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the key blocks each query block attends to under sliding-window block attention.

    Args:
        length: Tokens of the sequence.
        block: Tokens of a block.
        window: Blocks a query block sees, its own included.
        device: Where the lists live.

    Returns:
        `block_indices` int32 [1, 1, num_blocks, K] with K the smaller of window and num_blocks,
        ascending within a row and padded with 0, and `block_counts` int32 [1, 1, num_blocks].
    """
    blocks = torch.arange(-(-length // block))
    counts = (blocks + 1).clamp(max=window)
    steps = torch.arange(min(window, len(blocks)))
    indices = (blocks + 1 - counts)[:, None] + steps
    indices = indices.masked_fill(steps >= counts[:, None], 0)
    return indices[None, None].to(device, torch.int32), counts[None, None].to(device, torch.int32)


def _sta_rows(layout: BlockLayout, window: Window) -> tuple[Tensor, Tensor]:
    before = torch.arange(layout.num_text_blocks_before)
    first_after = layout.num_text_blocks_before + layout.num_video_blocks
    after = torch.arange(first_after, layout.num_blocks)
    video = _window_rows(layout, window) + layout.num_text_blocks_before
    tiles = video.shape[0]
    rows = torch.cat([before.expand(tiles, -1), video, after.expand(tiles, -1)], dim=1)
    counts = torch.full((layout.num_blocks,), layout.num_blocks)
    counts[layout.num_text_blocks_before : first_after] = rows.shape[1]
    if tiles == layout.num_blocks:
        return rows, counts
    everything = torch.arange(layout.num_blocks)
    rows = F.pad(rows, (0, layout.num_blocks - rows.shape[1]))
    text_before = everything.expand(len(before), -1)
    text_after = everything.expand(len(after), -1)
    return torch.cat([text_before, rows, text_after]), counts


def _window_rows(layout: BlockLayout, window: Window) -> Tensor:
    rows = torch.zeros(1, 1, dtype=torch.int64)
    for num_tiles, nominal in zip(layout.tiles_per_axis, window, strict=True):
        width = effective_width(num_tiles, nominal)
        start = (torch.arange(num_tiles) - nominal // 2).clamp(0, num_tiles - width)
        visible = start[:, None] + torch.arange(width)
        rows = rows[:, None, :, None] * num_tiles + visible[None, :, None, :]
        rows = rows.flatten(2).flatten(0, 1)
    return rows
