"""Video sparse attention as an op: top-k lists over the kernel op, and a gated pooled branch.

`compiled_sparse::vsa` is composite: tracing turns means, scores, gating and the making of lists
into ordinary operations, between one selection op and one kernel op. Method: arXiv 2505.13389;
text, key masks, grouped heads and any grid added here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.checks import check_length
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.tiles import compute_dtype
from compiled_sparse.ops.tiles import count_tiles
from compiled_sparse.ops.tiles import is_traced
from compiled_sparse.ops.tiles import means_of_tiles
from compiled_sparse.ops.tiles import sizes_of_tiles
from compiled_sparse.ops.tiles import spread_over_tokens
from compiled_sparse.ops.top_k import top_k_blocks
from compiled_sparse.sparsity import num_selected

LIBRARY.define(
    "vsa(Tensor q, Tensor k, Tensor v, Tensor? key_mask, SymInt[] grid, int[] tile, "
    "SymInt text_before, SymInt text_after, float sparsity, bool ungated, "
    "Tensor? given_sparsity, Tensor? gate, float? scale) -> (Tensor out, Tensor lse)"
)


@dataclass(frozen=True)
class _Geometry:
    """Where the video is in the sequence, and its tiles; sizes may be symbolic."""

    grid: list[Any]
    tile: list[int]
    before: Any
    after: Any

    @property
    def num_tiles(self) -> Any:
        return math.prod(count_tiles(self.grid, self.tile))

    @property
    def text_blocks(self) -> tuple[Any, Any]:
        size = math.prod(self.tile)
        before, after = ((text + size - 1) // size for text in (self.before, self.after))
        return before, after

    @property
    def has_text(self) -> bool:
        lengths = (self.before, self.after)
        return any(not isinstance(length, int) or length > 0 for length in lengths)

    def video(self, x: Tensor, dim: int = 2) -> Tensor:
        """Return the video tokens of a tensor over the whole sequence."""
        return x.narrow(dim, self.before, math.prod(self.grid)) if self.has_text else x


def _vsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    text_before: int,
    text_after: int,
    sparsity: float,
    ungated: bool,
    given_sparsity: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    geometry = _Geometry(grid, tile, text_before, text_after)
    _check(q, k, v, key_mask, geometry, gate)
    _check_sparsity(given_sparsity)
    visible = None if key_mask is None else geometry.video(key_mask, 1)
    scores = _scores(q, k, geometry, visible, scale)
    selected = _select(scores, sparsity, given_sparsity)
    if geometry.has_text:
        selected = _with_text(*selected, geometry)
    ops = torch.ops.compiled_sparse
    out, lse = ops.block_sparse_attention(
        q, k, v, *selected, key_mask, grid, tile, tile, text_before, text_after, scale
    )
    if gate is not None or ungated:
        compressed = _compressed(scores, v, geometry, visible)
        out = out + compressed if gate is None else torch.addcmul(out, gate, compressed)
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    geometry: _Geometry,
    gate: Tensor | None,
) -> None:
    check_tensors(q, k, v, key_mask, ())
    if not is_traced(q):
        check_shapes(q, k, v, key_mask)
        where = (tuple(geometry.grid), tuple(geometry.tile), geometry.before, geometry.after)
        for name, tensor in (("q", q), ("k", k)):
            check_length(name, tensor, BlockLayout(*where))
        if gate is not None and gate.shape != q.shape:
            raise ShapeError(
                "the gate has another shape than the queries",
                got=f"gate {tuple(gate.shape)}, q {tuple(q.shape)}",
                expected="[batch, query heads, length, head_dim], text included",
                next_step="reshape it as the queries are; at text tokens its value does not matter",
            )
    if gate is not None and gate.dtype != q.dtype:
        raise DtypeError(
            "the gate has another dtype than the queries",
            got=f"gate {gate.dtype}, q {q.dtype}",
            expected="one dtype",
            next_step="cast the gate with .to(q.dtype)",
        )


def _check_sparsity(sparsity: Tensor | None) -> None:
    """Check that no rounding of the number changes how many tiles it keeps."""
    if sparsity is not None and (sparsity.dim() or sparsity.dtype != torch.float64):
        raise DtypeError(
            "the sparsity is no float64 tensor without axes",
            got=f"{sparsity.dtype} of shape {tuple(sparsity.shape)}",
            expected="one number in float64",
            next_step="pass torch.tensor(0.9, dtype=torch.float64)",
        )


def _means(x: Tensor, geometry: _Geometry, visible: Tensor | None) -> Tensor:
    """Means of the video's tiles; hidden tokens have no part in them."""
    x = geometry.video(x)
    where = (geometry.grid, geometry.tile)
    if visible is None:
        return means_of_tiles(x, *where)
    wide = x.to(compute_dtype(x)).masked_fill(~visible[:, None, :, None], 0.0)
    sizes = sizes_of_tiles(*where, x.device).to(wide.dtype)
    shown = _shown(visible, geometry, wide.dtype)
    return (means_of_tiles(wide, *where) * (sizes[:, None] / shown.clamp(min=1.0))).to(x.dtype)


def _shown(visible: Tensor, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
    """Visible tokens of each tile [batch, 1, tiles, 1]."""
    where = (geometry.grid, geometry.tile)
    share = means_of_tiles(visible.to(dtype)[:, None, :, None], *where)
    return (share * sizes_of_tiles(*where, share.device).to(dtype)[:, None]).round()


def _scores(
    q: Tensor, k: Tensor, geometry: _Geometry, visible: Tensor | None, scale: float | None
) -> Tensor:
    """Scaled products of mean queries and mean keys [batch, query heads, tiles, tiles].

    Rounded as published: means, products and quotients are in the dtype of the inputs.
    """
    queries, keys = _means(q, geometry, visible), _means(k, geometry, visible)
    scores = _product(queries, _per_query_head(keys, q).transpose(-1, -2))
    scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
    if visible is None:
        return scores
    is_empty = _shown(visible, geometry, compute_dtype(q)).transpose(-1, -2) == 0
    return scores.masked_fill(is_empty, torch.finfo(scores.dtype).min)


def _per_query_head(pooled: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // pooled.shape[1]
    return pooled if groups == 1 else pooled.repeat_interleave(groups, dim=1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product, summed in float32 and rounded once: slow in low precision on CPUs."""
    if left.device.type != "cpu":
        return left @ right
    compute = compute_dtype(left)
    return (left.to(compute) @ right.to(compute)).to(left.dtype)


def _select(
    scores: Tensor, sparsity: float, given_sparsity: Tensor | None
) -> tuple[Tensor, Tensor]:
    """List the tiles of the highest scores; none of it depends on a value the host must know."""
    num_tiles: Any = scores.shape[-1]
    if given_sparsity is None and isinstance(num_tiles, int):
        return top_k_blocks(scores, num_selected(num_tiles, sparsity))
    if given_sparsity is None:
        given_sparsity = torch.full((), sparsity, dtype=torch.float64, device=scores.device)
    count = ((1.0 - given_sparsity) * num_tiles).ceil().clamp(min=1, max=num_tiles)
    return top_k_blocks(scores, count.to(torch.int64), max_k=num_tiles)


def _with_text(tiles: Tensor, counts: Tensor, geometry: _Geometry) -> tuple[Tensor, Tensor]:
    """Put the text in front of and behind each row, and rows of everything around them."""
    before, after = geometry.text_blocks
    num_tiles = geometry.num_tiles
    num_blocks = before + num_tiles + after
    slots = torch.arange(num_blocks, dtype=torch.int32, device=tiles.device)
    is_text = (slots < before) | (slots >= before + num_tiles)
    # Padded, not concatenated: numbers of runs are no sizes, of which one would be a special case.
    rows = F.pad(tiles, (before, num_blocks - before - tiles.shape[-1], before, after)) + before
    counts = F.pad(counts, (before, after))
    # Slot i of a row is in front of, in or behind its `counts` tiles.
    behind = slots - before - counts[..., None]
    rows = torch.where(slots < before, slots, rows)
    rows = torch.where(behind >= 0, behind + (before + num_tiles), rows)
    rows = torch.where(behind < after, rows, 0)
    rows = torch.where(is_text[:, None], slots, rows)
    counts = torch.where(is_text, num_blocks, counts + (before + after))
    return rows.to(torch.int32), counts.to(torch.int32)


def _compressed(scores: Tensor, v: Tensor, geometry: _Geometry, visible: Tensor | None) -> Tensor:
    """Attention among the tiles' means, for every token; zero at text tokens."""
    values = _means(v, geometry, visible)
    values = values.repeat_interleave(scores.shape[1] // v.shape[1], dim=1)
    pooled = _product(scores.softmax(dim=-1), values)
    spread = spread_over_tokens(pooled, geometry.grid, geometry.tile)
    return F.pad(spread, (0, 0, geometry.before, geometry.after)) if geometry.has_text else spread


LIBRARY.impl("vsa", _vsa, "CompositeImplicitAutograd")
register_autocast_like_sdpa("vsa")
