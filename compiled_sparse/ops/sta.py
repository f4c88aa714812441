"""Sliding tile attention as an op: static block lists over the kernel op.

`compiled_sparse::sta` is composite: tracing turns it into one list op and one kernel op. Lists are
built once per layout and copied for each call. Method: arXiv 2502.04507; backward, text and partial
tiles added here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import ceil_div
from compiled_sparse.layout import tiles_along
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.windows import Window

_GEOMETRY = "SymInt[] grid, int[] tile, int[] windows, SymInt text_before, SymInt text_after"

LIBRARY.define(
    f"sta_block_lists({_GEOMETRY}, Device device) -> (Tensor block_indices, Tensor block_counts)"
)
LIBRARY.define(
    f"sta(Tensor q, Tensor k, Tensor v, Tensor? key_mask, {_GEOMETRY}, float? scale) "
    "-> (Tensor out, Tensor lse)"
)


def flatten_windows(windows: Sequence[Window]) -> list[int]:
    """Write windows as the flat integer list the op's schema takes."""
    return [extent for window in windows for extent in window]


def unflatten_windows(flat: Sequence[int], num_axes: int) -> tuple[Window, ...]:
    """Read windows from the flat integer list of the op's schema."""
    return tuple(tuple(flat[i : i + num_axes]) for i in range(0, len(flat), num_axes))


def _block_lists(
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    layout = BlockLayout(tuple(grid), tuple(tile), text_before, text_after)
    indices, counts = sta_lists(layout, unflatten_windows(windows, len(grid)), device)
    # The compiler may reuse an output as scratch memory, so the cached plan is never handed out.
    return indices.clone(), counts.clone()


def _block_lists_fake(
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    num_blocks, tiles_per_axis = count_blocks(grid, tile, text_before, text_after)
    per_head = unflatten_windows(windows, len(grid))
    # Lists are narrower without text, so a symbolic text that may vanish takes a guard.
    if guard_or_false(text_before + text_after == 0):
        width = list_width(tiles_per_axis, per_head)
    else:
        width = num_blocks
    indices = torch.empty(1, len(per_head), num_blocks, width, dtype=torch.int32, device=device)
    counts = torch.empty(1, len(per_head), num_blocks, dtype=torch.int32, device=device)
    return indices, counts


def count_blocks(
    grid: Sequence[Any], tile: Sequence[int], text_before: Any, text_after: Any
) -> tuple[Any, list[Any]]:
    """Return the number of blocks and of tiles per axis; sizes may be symbolic."""
    tiles_per_axis = tiles_along(grid, tile)
    text_blocks = sum(ceil_div(text, math.prod(tile)) for text in (text_before, text_after))
    return math.prod(tiles_per_axis) + text_blocks, tiles_per_axis


def list_width(tiles_per_axis: Sequence[Any], windows: Sequence[Window]) -> Any:
    """Longest row over the heads; `sym_min` and `sym_max` keep symbolic grids free of guards."""
    widest: Any = 0
    for window in windows:
        width: Any = 1
        for num_tiles, nominal in zip(tiles_per_axis, window, strict=True):
            width = width * torch.sym_min(2 * (nominal // 2) + 1, num_tiles)
        widest = torch.sym_max(widest, width)
    return widest


def _sta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    windows: list[int],
    text_before: int,
    text_after: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    ops = torch.ops.compiled_sparse
    block_indices, block_counts = ops.sta_block_lists(
        grid, tile, windows, text_before, text_after, q.device
    )
    outputs: tuple[Tensor, Tensor] = ops.block_sparse_attention(
        q,
        k,
        v,
        block_indices,
        block_counts,
        key_mask,
        grid,
        tile,
        tile,
        text_before,
        text_after,
        scale,
    )
    return outputs


LIBRARY.impl("sta_block_lists", _block_lists, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::sta_block_lists", _block_lists_fake, lib=LIBRARY)
LIBRARY.impl("sta", _sta, "CompositeImplicitAutograd")
register_autocast_like_sdpa("sta")
