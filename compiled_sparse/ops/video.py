"""The video in a sequence as tiles: their means, the best of them, and text around the lists.

What the mechanisms have in common that compare tiles by their means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.errors import DtypeError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import ceil_div
from compiled_sparse.layout import tiles_along
from compiled_sparse.ops.checks import check_length
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.tensors import compute_dtype
from compiled_sparse.ops.tiles import is_traced
from compiled_sparse.ops.tiles import means_of_tiles
from compiled_sparse.ops.tiles import sizes_of_tiles
from compiled_sparse.ops.top_k import top_k_blocks


@dataclass(frozen=True)
class VideoTiles:
    """Where the video is in the sequence, and its tiles; sizes may be symbolic."""

    grid: list[Any]
    tile: list[int]
    before: Any
    after: Any

    @property
    def num_tiles(self) -> Any:
        """Number of tiles, partial ones included."""
        return math.prod(tiles_along(self.grid, self.tile))

    @property
    def text_blocks(self) -> tuple[Any, Any]:
        """Number of runs of text in front and behind."""
        size = math.prod(self.tile)
        return ceil_div(self.before, size), ceil_div(self.after, size)

    @property
    def num_blocks(self) -> Any:
        """Number of blocks, runs of text included."""
        return sum(self.text_blocks, self.num_tiles)

    @property
    def has_text(self) -> bool:
        """Whether there may be text."""
        lengths = (self.before, self.after)
        return any(not isinstance(length, int) or length > 0 for length in lengths)

    def video(self, x: Tensor, dim: int = 2) -> Tensor:
        """Return the video tokens of a tensor over the whole sequence."""
        return x.narrow(dim, self.before, math.prod(self.grid)) if self.has_text else x

    def means(self, key_mask: Tensor | None, like: Tensor) -> TileMeans:
        """Return what takes means of the tokens that a mask shows."""
        return TileMeans(self, key_mask, like)

    def check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        """Check the tensors of a call over the whole sequence.

        Raises:
            ShapeError: if shapes do not fit each other.
            DtypeError: if dtypes are unsupported or differ.
            LayoutError: if grid and text do not add up to the lengths.
            DeviceError: if the tensors are on different devices.
        """
        check_tensors(q, k, v, key_mask, ())
        if is_traced(q):
            return
        check_shapes(q, k, v, key_mask)
        layout = BlockLayout(tuple(self.grid), tuple(self.tile), self.before, self.after)
        for name, tensor in (("q", q), ("k", k)):
            check_length(name, tensor, layout)


class TileMeans:
    """Means of the video's tiles; hidden tokens have no part in them.

    Args:
        tiles: The tiles.
        key_mask: bool [batch, length], which tokens are visible; None for all.
        like: A tensor of the dtype that means are taken of.
    """

    def __init__(self, tiles: VideoTiles, key_mask: Tensor | None, like: Tensor) -> None:
        self._tiles = tiles
        self._where = (tiles.grid, tiles.tile)
        self._visible = None if key_mask is None else tiles.video(key_mask, 1)
        if self._visible is not None:
            sizes = sizes_of_tiles(*self._where, like.device).to(compute_dtype(like))[:, None]
            share = means_of_tiles(self._visible.to(sizes.dtype)[:, None, :, None], *self._where)
            shown = (share * sizes).round()
            self._factor = sizes / shown.clamp(min=1.0)
            self._is_empty = shown.transpose(-1, -2) == 0

    def of(self, x: Tensor) -> Tensor:
        """Return means [batch, heads, tiles, channels] of a tensor over the whole sequence."""
        x = self._tiles.video(x)
        if self._visible is None:
            return means_of_tiles(x, *self._where)
        wide = x.to(compute_dtype(x)).masked_fill(~self._visible[:, None, :, None], 0.0)
        return (means_of_tiles(wide, *self._where) * self._factor).to(x.dtype)

    def without_empty(self, scores: Tensor) -> Tensor:
        """Return scores [..., tiles] with those of tiles that show nothing below all others."""
        if self._visible is None:
            return scores
        return scores.masked_fill(self._is_empty, torch.finfo(scores.dtype).min)


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Return what is stored by key head once for each query head."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def best_tiles(
    scores: Tensor,
    share: float | Tensor,
    fixed: Callable[[int, float], int],
    changing: Callable[[Any, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """List the tiles of the highest scores; none of it depends on a value the host must know.

    Args:
        scores: [batch, heads, query tiles, key tiles].
        share: What tells how many, a number or a float64 tensor without axes.
        fixed: From the number of key tiles and the share to how many are listed.
        changing: The same where one of the two is no plain number.
    """
    num_tiles: Any = scores.shape[-1]
    if not isinstance(share, Tensor):
        if isinstance(num_tiles, int):
            return top_k_blocks(scores, fixed(num_tiles, share))
        share = torch.full((), share, dtype=torch.float64, device=scores.device)
    count = changing(num_tiles, share).clamp(min=1, max=num_tiles)
    return top_k_blocks(scores, count.to(torch.int64), max_k=num_tiles)


def with_text(
    lists: tuple[Tensor, Tensor], queries: VideoTiles, keys: VideoTiles
) -> tuple[Tensor, Tensor]:
    """Put the text in front of and behind each row, and rows of everything around them.

    Args:
        lists: Key tiles of each query tile.
        queries: Tiles of the queries.
        keys: Tiles of the keys, on the same grid.
    """
    tiles, counts = lists
    if not queries.has_text:
        return tiles, counts
    rows_before, rows_after = queries.text_blocks
    before, after = keys.text_blocks
    first_behind, width = before + keys.num_tiles, keys.num_blocks
    slots = torch.arange(width, dtype=torch.int32, device=tiles.device)
    row = torch.arange(queries.num_blocks, dtype=torch.int32, device=tiles.device)
    is_text = (row < rows_before) | (row >= rows_before + queries.num_tiles)
    # Padded, not concatenated: numbers of runs are no sizes, of which one would be a special case.
    room = (before, width - before - tiles.shape[-1])
    rows = F.pad(tiles, (*room, rows_before, rows_after)) + before
    counts = F.pad(counts, (rows_before, rows_after))
    # Slot i of a row is in front of, in or behind its `counts` tiles.
    behind = slots - before - counts[..., None]
    rows = torch.where(slots < before, slots, rows)
    rows = torch.where(behind >= 0, behind + first_behind, rows)
    rows = torch.where(behind < after, rows, 0)
    rows = torch.where(is_text[:, None], slots, rows)
    counts = torch.where(is_text, width, counts + (before + after))
    return rows.to(torch.int32), counts.to(torch.int32)


def check_given_sparsity(sparsity: Tensor | None) -> None:
    """Check that no rounding of the number changes how many tiles it keeps.

    Raises:
        DtypeError: if it is no float64 tensor without axes.
    """
    if sparsity is not None and (sparsity.dim() or sparsity.dtype != torch.float64):
        raise DtypeError(
            "the sparsity is no float64 tensor without axes",
            got=f"{sparsity.dtype} of shape {tuple(sparsity.shape)}",
            expected="one number in float64",
            next_step="pass torch.tensor(0.9, dtype=torch.float64)",
        )
