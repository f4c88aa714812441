"""Which chunks each query attends to: `compiled_sparse::select_chunks`.

A gate says how much a query likes a chunk: its product with the mean of the chunk's keys. What
competes, a group of pairs of query and chunk, is ranked as a whole. The op is opaque, without
gradient, and nothing in it waits for a device. Method: arXiv 2506.23858; text, key masks and
grouped heads added here, equal gates told apart by their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import cpu
from compiled_sparse.ops import gpu_selection
from compiled_sparse.ops.bit_masks import pack_bits
from compiled_sparse.ops.bit_masks import words_for
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import tile_of_token
from compiled_sparse.ops.routing import uses_gpu_kernels
from compiled_sparse.ops.tensors import compute_dtype
from compiled_sparse.ops.tiles import means_of_tiles
from compiled_sparse.ops.tiles import sums_of_tiles
from compiled_sparse.ops.video import VideoTiles
from compiled_sparse.ops.video import per_query_head

_NO_SPREAD = 1e-6
_NO_TOTAL = 1e-6
_MAX_PAIRS = 1 << 26
"""Pairs of query and chunk that are ranked at a time, where groups are small enough."""

_ORDERS = {
    # Groups, then what competes in one, in the order in which equal gates are taken.
    "query_head": ("b h s", "c"),
    "block": ("b c", "h s"),
    "head_global": ("h", "b c s"),
    "overall": ("", "b c h s"),
}

LIBRARY.define(
    "select_chunks(Tensor q, Tensor k, Tensor? key_mask, SymInt[] grid, int[] tile, "
    "SymInt text_before, SymInt text_after, str mode, str groups, int topk, float threshold) "
    "-> Tensor"
)


@dataclass(frozen=True)
class _Rule:
    mode: str
    groups: str
    topk: int
    threshold: float

    def choose(self, gate: Tensor, competing: Tensor, own: Tensor) -> Tensor:
        """Return which pairs [batch, heads, chunks, tokens] are chosen beside the own ones.

        Args:
            gate: Of the pairs.
            competing: bool [batch, 1, chunks, tokens], the pairs that count.
            own: bool like it, those of a token and its own chunk.
        """
        outer, inner = _ORDERS[self.groups]
        forward = f"b h c s -> ({outer}) ({inner})"
        backward = f"({outer}) ({inner}) -> b h c s"
        sizes = dict(zip("bhcs", gate.shape, strict=True))
        counted, mine, rows = (
            rearrange(each.expand(gate.shape), forward) for each in (competing, own, gate)
        )
        others = counted & ~mine
        if self.mode == "topk":
            # Own pairs are the first of the `topk` for each token that counts.
            wanted = (counted & mine).sum(-1, keepdim=True) * (self.topk - 1)
            chosen = _best(rows, others, wanted)
        else:
            rows = _normalised(rows, counted)
            chosen = _shortest_prefix(rows, counted & mine, others, self.threshold)
        return rearrange(chosen, backward, **sizes)


def _best(rows: Tensor, others: Tensor, wanted: Tensor) -> Tensor:
    """Choose the `wanted` largest of each row, of equal ones the first."""
    order = _ranked(rows, others)
    taken = torch.arange(rows.shape[-1], device=rows.device) < wanted
    return torch.zeros_like(others).scatter_(-1, order, taken) & others


def _ranked(rows: Tensor, others: Tensor) -> Tensor:
    """Return the places of a row's values, largest first, what does not compete last."""
    ranked = rows.nan_to_num(nan=torch.finfo(rows.dtype).min).masked_fill(~others, -torch.inf)
    return ranked.sort(dim=-1, descending=True, stable=True).indices


def _normalised(rows: Tensor, counted: Tensor) -> Tensor:
    """Scale what counts of each row to 0..1; the rest is 0."""
    low = rows.masked_fill(~counted, torch.inf).amin(-1, keepdim=True)
    spread = rows.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True) - low
    spread = torch.where(spread > _NO_SPREAD, spread, 1.0)
    return ((rows - low) / spread).masked_fill(~counted, 0.0)


def _shortest_prefix(rows: Tensor, mine: Tensor, others: Tensor, threshold: float) -> Tensor:
    """Choose the largest others of each row until their share, with the own ones', is enough.

    Sums are float64: of values in float32 they are then as good as exact, whatever the order.
    """
    total = rows.sum(-1, keepdim=True, dtype=torch.float64) + _NO_TOTAL
    of_own = rows.masked_fill(~mine, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    need = (threshold - of_own / total).clamp(min=0.0)
    order = _ranked(rows, others)
    values = rows.masked_fill(~others, 0.0).gather(-1, order)
    reached = values.cumsum(-1, dtype=torch.float64) / total >= need
    # One is taken before any is asked for.
    taken = F.pad(~reached, (1, -1), value=True)
    return torch.zeros_like(others).scatter_(-1, order, taken) & others


def _select(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    text_before: int,
    text_after: int,
    mode: str,
    groups: str,
    topk: int,
    threshold: float,
) -> Tensor:
    tiles = VideoTiles(grid, tile, text_before, text_after)
    if not q.numel():
        return _empty(q, tiles)
    rule = _Rule(mode, groups, min(topk, q.shape[0] * tiles.num_tiles), threshold)
    own = tile_of_token(BlockLayout(tuple(grid), tuple(tile)), q.device)
    visible = None if key_mask is None else tiles.video(key_mask, 1)
    keys, shown = _mean_keys(tiles.video(k), visible, tiles)
    select_per_query = _kernel_for(q) if groups == "query_head" else None
    if select_per_query is not None:
        return select_per_query(
            q,
            keys.contiguous(),
            own.int(),
            shown,
            visible,
            text_before=text_before,
            text_after=text_after,
            runs_before=tiles.text_blocks[0],
            runs_after=tiles.text_blocks[1],
            mode=mode,
            count=_others_of_each(rule, tiles),
            threshold=threshold,
        )
    heads = q.shape[1] if groups in ("block", "overall") else _heads_at_a_time(q, tiles)
    pieces = [
        _packed(queries, keys_of_heads, rule, tiles, own, (shown, visible))
        for queries, keys_of_heads in zip(
            q.split(heads, 1), per_query_head(keys, q).split(heads, 1), strict=True
        )
    ]
    return torch.cat(pieces, dim=1)


def _kernel_for(q: Tensor) -> Callable[..., Tensor] | None:
    """Return what selects for each query alone, where there is a kernel for it."""
    if uses_gpu_kernels(q):
        return None if q.dtype == torch.float64 else gpu_selection.select_per_query
    return cpu.select_per_query if cpu.selects_per_query() else None


def _mean_keys(
    k: Tensor, visible: Tensor | None, tiles: VideoTiles
) -> tuple[Tensor, Tensor | None]:
    """Return the mean key of each chunk, and which chunks show a token; None for all.

    Sums are divided once, also under a mask, so that equal means come out equal.
    """
    where = (tiles.grid, tiles.tile)
    wide = k.to(compute_dtype(k))
    if visible is None:
        return means_of_tiles(wide, *where), None
    count = sums_of_tiles(visible.to(wide.dtype)[:, None, :, None], *where)
    sums = sums_of_tiles(wide.masked_fill(~visible[:, None, :, None], 0.0), *where)
    return sums / count.clamp(min=1.0), count[:, 0, :, 0] > 0


def _others_of_each(rule: _Rule, tiles: VideoTiles) -> int:
    """How many chunks each query takes beside its own in mode "topk"; all, where only that one."""
    return rule.topk - 1 if rule.topk > 1 else int(tiles.num_tiles)


def _heads_at_a_time(q: Tensor, tiles: VideoTiles) -> int:
    pairs = q.shape[0] * q.shape[2] * int(tiles.num_tiles)
    return min(q.shape[1], max(1, _MAX_PAIRS // max(pairs, 1)))


def _packed(
    q: Tensor,
    means: Tensor,
    rule: _Rule,
    tiles: VideoTiles,
    own: Tensor,
    shown: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Select for some heads; `shown` are the chunks and the tokens that count, None for all."""
    chunks = torch.arange(means.shape[2], device=q.device)
    is_own = (chunks[:, None] == own)[None, None]
    competing = torch.ones_like(is_own).expand(q.shape[0], -1, -1, -1)
    if shown[0] is not None and shown[1] is not None:
        competing = shown[0][:, None, :, None] & shown[1][:, None, None, :]
    if rule.mode == "topk" and rule.topk == 1:
        # The published code selects nothing then, and where nothing is, everything.
        chosen = (competing | is_own).expand(-1, q.shape[1], -1, -1)
    else:
        queries = tiles.video(q).to(means.dtype)
        gate = means @ queries.transpose(-1, -2)
        chosen = rule.choose(gate, competing, is_own) | is_own
    runs = tiles.text_blocks
    room = (tiles.before, tiles.after, *runs)
    return pack_bits(F.pad(chosen, room, value=True))


def _select_fake(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    grid: list[Any],
    tile: list[int],
    text_before: Any,
    text_after: Any,
    *rule: Any,
) -> Tensor:
    return _empty(q, VideoTiles(grid, tile, text_before, text_after))


def _empty(q: Tensor, tiles: VideoTiles) -> Tensor:
    """Allocate a selection."""
    shape = (*q.shape[:2], tiles.num_blocks, words_for(q.shape[2]))
    return q.new_empty(shape, dtype=torch.int32)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("select_chunks", _select, _device)
torch.library.register_fake(f"{NAMESPACE}::select_chunks", _select_fake, lib=LIBRARY)
