"""Block lists of one rank's queries over another's keys, cut from those of the whole video."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.distributed.ring_schedule import Part
from compiled_sparse.distributed.ring_schedule import RingPattern
from compiled_sparse.distributed.ring_schedule import ring_part
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.ops.plan import swba_lists
from compiled_sparse.ops.sta import count_blocks
from compiled_sparse.ops.sta import list_width
from compiled_sparse.ops.sta import unflatten_windows

PATTERN_SCHEMA = "str kind, int[] grid, int[] tile, int[] windows, int size"

LIBRARY.define(
    f"ring_block_lists({PATTERN_SCHEMA}, int rank, int source, int text_before, int text_after, "
    "Device device) -> (Tensor block_indices, Tensor block_counts)"
)


def pattern_of(
    kind: Any, grid: list[int], tile: list[int], windows: list[int], size: int
) -> RingPattern:
    """Return a pattern from the plain values that schemas take."""
    return RingPattern(
        kind=kind,
        grid=tuple(grid),
        tile=tuple(tile),
        windows=unflatten_windows(windows, len(grid)),
        size=size,
    )


def part_of(pattern: RingPattern, rank: int, source: int) -> Part | None:
    """Return what a rank computes with a rank's keys; with its own, everything it has."""
    if source != rank:
        return ring_part(pattern, rank, source)
    count = pattern.layers_per_shard
    return Part(source=rank, query_first=0, key_first=0, count=count)


def _whole(pattern: RingPattern) -> tuple[Tensor, Tensor]:
    """Lists over the whole video, [1 or heads, tiles, K]."""
    device = torch.device("cpu")
    if pattern.kind == "sta":
        lists = sta_lists(BlockLayout(pattern.grid, pattern.tile), pattern.windows, device)
    elif pattern.kind == "swba":
        ((window,),) = pattern.windows
        lists = swba_lists(pattern.grid[0], pattern.tile[0], window, device)
    else:
        num_tiles = pattern.num_layers * pattern.layer_tiles
        everything = torch.arange(num_tiles, dtype=torch.int32)
        return everything.expand(1, num_tiles, -1), everything.new_full((1, num_tiles), num_tiles)
    return lists[0][0], lists[1][0]


def _restricted(pattern: RingPattern, rank: int, part: Part) -> tuple[Tensor, Tensor]:
    """Lists of a part's queries, of which those in the part's keys are left, counted from there."""
    tiles = pattern.layer_tiles
    first_row = (rank * pattern.layers_per_shard + part.query_first) * tiles
    first_key = (part.source * pattern.layers_per_shard + part.key_first) * tiles
    indices, counts = (
        each[:, first_row : first_row + part.count * tiles] for each in _whole(pattern)
    )
    kept = torch.arange(indices.shape[-1]) < counts[..., None]
    kept &= (indices >= first_key) & (indices < first_key + part.count * tiles)
    order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)
    indices = (indices - first_key).masked_fill(~kept, 0).gather(-1, order)
    return indices[..., : _width(pattern, part)], kept.sum(-1)


def _width(pattern: RingPattern, part: Part) -> int:
    """Longest row there may be, in tiles."""
    if pattern.kind == "dense":
        return part.count * pattern.layer_tiles
    if pattern.kind == "swba":
        return min(pattern.windows[0][0], part.count)
    rest = BlockLayout(pattern.grid, pattern.tile).tiles_per_axis[1:]
    return int(list_width((part.count, *rest), pattern.windows))


def _with_text(
    lists: tuple[Tensor, Tensor], layout: BlockLayout, rank: int
) -> tuple[Tensor, Tensor]:
    """Let tiles see all text too, and text see all tiles; its own keys count on rank 0 only."""
    before, tiles = layout.num_text_blocks_before, layout.num_video_blocks
    after, width = layout.num_text_blocks_after, layout.num_blocks
    indices, counts = lists
    slots = torch.arange(width)
    behind = slots - before - counts[..., None]
    video = F.pad(indices, (before, width - before - indices.shape[-1])) + before
    video = torch.where(slots < before, slots, video)
    video = torch.where(behind >= 0, behind + before + tiles, video)
    video = torch.where(behind < after, video, 0)
    text = slots if rank == 0 else (slots + before) * (slots < tiles)
    rows = text.expand(video.shape[0], before + after, -1)
    num_seen = width if rank == 0 else tiles
    counts = F.pad(counts + (before + after), (before, after), value=num_seen)
    return torch.cat([rows[:, :before], video, rows[:, before:]], dim=1), counts


@lru_cache(maxsize=256)
def ring_lists(
    pattern: RingPattern,
    rank: int,
    source: int,
    text_before: int,
    text_after: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the key blocks that each query block of a part attends to.

    Args:
        pattern: What sees what.
        rank: Whose queries.
        source: Whose keys, of a rank that this one hears from; with its own, text comes along.
        text_before: Text tokens in front of the own video.
        text_after: Text tokens behind it.
        device: Where the lists live.

    Returns:
        `block_indices` int32 [1, 1 or heads, query blocks, K], padded with 0, and `block_counts`
        int32 [1, 1 or heads, query blocks].
    """
    part = part_of(pattern, rank, source)
    assert part is not None, "no step of the schedule brings these keys"
    indices, counts = _restricted(pattern, rank, part)
    if source == rank and text_before + text_after:
        layout = BlockLayout(pattern.shard_grid, pattern.tile, text_before, text_after)
        indices, counts = _with_text((indices, counts), layout, rank)
    return indices[None].to(device, torch.int32), counts[None].to(device, torch.int32)


def _block_lists(*arguments: Any) -> tuple[Tensor, Tensor]:
    indices, counts = ring_lists(pattern_of(*arguments[:5]), *arguments[5:])
    # The compiler may reuse an output as scratch memory, so the cached plan is never handed out.
    return indices.clone(), counts.clone()


def _block_lists_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    pattern = pattern_of(*arguments[:5])
    rank, source, text_before, text_after, device = arguments[5:]
    part = part_of(pattern, rank, source)
    assert part is not None, "no step of the schedule brings these keys"
    rows, width = part.count * pattern.layer_tiles, _width(pattern, part)
    if source == rank and text_before + text_after:
        rows, _ = count_blocks(pattern.shard_grid, pattern.tile, text_before, text_after)
        width = rows
    heads = max(1, len(pattern.windows))
    indices = torch.empty(1, heads, rows, width, dtype=torch.int32, device=device)
    return indices, torch.empty(1, heads, rows, dtype=torch.int32, device=device)


LIBRARY.impl("ring_block_lists", _block_lists, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::ring_block_lists", _block_lists_fake, lib=LIBRARY)
