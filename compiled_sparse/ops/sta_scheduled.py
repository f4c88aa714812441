"""Sliding tile attention whose windows differ by step, layer and head.

`compiled_sparse::sta_scheduled` reads step and layer from tensors, so that no change of either
compiles anything. On the CPU the lists come from the plan's cache; elsewhere they are computed on
the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from compiled_sparse.errors import BlockListError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.ops.sta import count_blocks
from compiled_sparse.ops.sta import list_width
from compiled_sparse.ops.sta import unflatten_windows

_SCHEDULE = "Tensor table, Tensor step, Tensor layer"
_GEOMETRY = "SymInt[] grid, int[] tile, int[] windows, SymInt text_before, SymInt text_after"

LIBRARY.define(
    f"sta_scheduled_block_lists({_GEOMETRY}, {_SCHEDULE}) "
    "-> (Tensor block_indices, Tensor block_counts)"
)
LIBRARY.define(
    f"sta_scheduled(Tensor q, Tensor k, Tensor v, Tensor? key_mask, {_GEOMETRY}, {_SCHEDULE}, "
    "float? scale) -> (Tensor out, Tensor lse)"
)


def _width(layout: BlockLayout, windows: Sequence[tuple[int, ...]]) -> int:
    """Length of a row of the lists: that of the longest any row of the table could need."""
    has_text = layout.text_before + layout.text_after > 0
    width: int = list_width(layout.tiles_per_axis, windows)
    return layout.num_blocks if has_text else width


def _block_lists_cpu(
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    table: Tensor,
    step: Tensor,
    layer: Tensor,
) -> tuple[Tensor, Tensor]:
    layout = BlockLayout(tuple(grid), tuple(tile), text_before, text_after)
    palette = unflatten_windows(windows, len(grid))
    row = tuple(map(tuple, select_row(table, step, layer).tolist()))
    if not set(row) <= set(palette):
        raise BlockListError(
            "the table of windows holds a window that is not in its palette",
            got=f"{row}",
            expected=f"windows among {palette}",
            next_step="list every window of the table in `windows`",
        )
    indices, counts = sta_lists(layout, row, table.device)
    # The compiler may reuse an output as scratch memory, so the cached plan is never handed out.
    missing = _width(layout, palette) - indices.shape[-1]
    return F.pad(indices, (0, missing)) if missing else indices.clone(), counts.clone()


def _block_lists_on_device(
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    table: Tensor,
    step: Tensor,
    layer: Tensor,
) -> tuple[Tensor, Tensor]:
    layout = BlockLayout(tuple(grid), tuple(tile), text_before, text_after)
    width = _width(layout, unflatten_windows(windows, len(grid)))
    return device_lists(layout, select_row(table, step, layer), width)


def select_row(table: Tensor, step: Tensor, layer: Tensor) -> Tensor:
    """Return the windows at a step in a layer, without waiting for the device.

    Args:
        table: Integers [steps, layers, heads, axes].
        step: int64, no dimensions.
        layer: int64, no dimensions.

    Returns:
        Windows [heads, axes]; past the end of the table those of its last row.
    """
    at_step = table.index_select(0, step.clamp(0, table.shape[0] - 1).view(1))[0]
    return at_step.index_select(0, layer.clamp(0, table.shape[1] - 1).view(1))[0]


def device_lists(layout: BlockLayout, windows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Compute what `sta_lists` gives, from windows that only the device knows.

    Args:
        layout: How the sequence is cut into blocks.
        windows: int64 [heads, axes], in tiles.
        width: Length of a row of the lists.

    Returns:
        `block_indices` int32 [1, heads, num_blocks, width] and `block_counts` int32
        [1, heads, num_blocks].
    """
    slots = torch.arange(width, device=windows.device)
    rows, visible = _video_rows(layout, windows, slots - layout.num_text_blocks_before)
    first_after = layout.num_text_blocks_before + layout.num_video_blocks
    rows = rows + layout.num_text_blocks_before
    behind = slots - layout.num_text_blocks_before - visible[:, None]
    counts = visible + layout.num_text_blocks_before + layout.num_text_blocks_after
    rows = torch.where((behind >= 0)[:, None], (behind + first_after)[:, None], rows)
    rows = torch.where(slots < layout.num_text_blocks_before, slots, rows)
    rows = rows.masked_fill((slots >= counts[:, None])[:, None], 0)
    counts = counts[:, None].expand(-1, layout.num_video_blocks)
    text = [layout.num_text_blocks_before, layout.num_text_blocks_after]
    everything = [slots.expand(rows.shape[0], size, -1) for size in text]
    full = [counts.new_full((rows.shape[0], size), layout.num_blocks) for size in text]
    indices = torch.cat([everything[0], rows, everything[1]], dim=1)
    all_counts = torch.cat([full[0], counts, full[1]], dim=1)
    return indices[None].int(), all_counts[None].int()


def _video_rows(layout: BlockLayout, windows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tile in each slot of each tile's row [heads, tiles, slots], and rows' lengths."""
    tiles = torch.arange(layout.num_video_blocks, device=windows.device)
    index: Any = 0
    visible: Any = 1
    stride = 1
    for axis in reversed(range(len(layout.grid))):
        num_tiles = layout.tiles_per_axis[axis]
        half = windows[:, axis, None] // 2
        extent = (2 * half + 1).clamp(max=num_tiles)
        position = tiles // stride % num_tiles
        start = (position - half).clamp(min=0).minimum(num_tiles - extent)
        offset = torch.div(slots, visible, rounding_mode="floor") % extent
        index = index + (start[:, :, None] + offset[:, None]) * stride
        visible, stride = visible * extent, stride * num_tiles
    return index, visible[:, 0]


def _block_lists_fake(
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    table: Tensor,
    step: Tensor,
    layer: Tensor,
) -> tuple[Tensor, Tensor]:
    num_blocks, tiles_per_axis = count_blocks(grid, tile, text_before, text_after)
    # Lists are narrower without text, so a symbolic text that may vanish takes a guard.
    if guard_or_false(text_before + text_after == 0):
        width = list_width(tiles_per_axis, unflatten_windows(windows, len(grid)))
    else:
        width = num_blocks
    heads = table.shape[2]
    indices = table.new_empty(1, heads, num_blocks, width, dtype=torch.int32)
    return indices, table.new_empty(1, heads, num_blocks, dtype=torch.int32)


def _sta_scheduled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    table: Tensor,
    step: Tensor,
    layer: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    ops = torch.ops.compiled_sparse
    block_indices, block_counts = ops.sta_scheduled_block_lists(
        grid, tile, windows, text_before, text_after, table, step, layer
    )
    geometry = (grid, tile, tile, text_before, text_after)
    outputs: tuple[Tensor, Tensor] = ops.block_sparse_attention(
        q, k, v, block_indices, block_counts, key_mask, *geometry, scale
    )
    return outputs


LIBRARY.impl("sta_scheduled_block_lists", _block_lists_cpu, "CPU")
LIBRARY.impl("sta_scheduled_block_lists", _block_lists_on_device, "CUDA")
torch.library.register_fake(
    f"{NAMESPACE}::sta_scheduled_block_lists", _block_lists_fake, lib=LIBRARY
)
LIBRARY.impl("sta_scheduled", _sta_scheduled, "CompositeImplicitAutograd")
register_autocast_like_sdpa("sta_scheduled")
