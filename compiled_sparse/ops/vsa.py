"""Video sparse attention as an op: top-k lists over the kernel op, and a gated pooled branch.

`compiled_sparse::vsa` is composite: tracing turns means, scores, gating and the making of lists
into ordinary operations, between one selection op and one kernel op. Method: arXiv 2505.13389;
text, key masks, grouped heads and any grid added here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ShapeError
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.tensors import product
from compiled_sparse.ops.tiles import is_traced
from compiled_sparse.ops.tiles import spread_over_tokens
from compiled_sparse.ops.video import TileMeans
from compiled_sparse.ops.video import VideoTiles
from compiled_sparse.ops.video import best_tiles
from compiled_sparse.ops.video import check_given_sparsity
from compiled_sparse.ops.video import per_query_head
from compiled_sparse.ops.video import with_text
from compiled_sparse.sparsity import num_selected

LIBRARY.define(
    "vsa(Tensor q, Tensor k, Tensor v, Tensor? key_mask, SymInt[] grid, int[] tile, "
    "SymInt text_before, SymInt text_after, float sparsity, bool ungated, "
    "Tensor? given_sparsity, Tensor? gate, float? scale) -> (Tensor out, Tensor lse)"
)


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
    tiles = VideoTiles(grid, tile, text_before, text_after)
    tiles.check(q, k, v, key_mask)
    _check_gate(gate, q)
    check_given_sparsity(given_sparsity)
    means = tiles.means(key_mask, q)
    scores = _scores(q, k, means, scale)
    share = sparsity if given_sparsity is None else given_sparsity
    selected = with_text(best_tiles(scores, share, num_selected, _num_selected), tiles, tiles)
    ops = torch.ops.compiled_sparse
    out, lse = ops.block_sparse_attention(
        q, k, v, *selected, key_mask, grid, tile, tile, text_before, text_after, scale
    )
    if gate is not None or ungated:
        compressed = _compressed(scores, v, tiles, means)
        out = out + compressed if gate is None else torch.addcmul(out, gate, compressed)
    return out, lse


def _check_gate(gate: Tensor | None, q: Tensor) -> None:
    if gate is None:
        return
    if not is_traced(q) and gate.shape != q.shape:
        raise ShapeError(
            "the gate has another shape than the queries",
            got=f"gate {tuple(gate.shape)}, q {tuple(q.shape)}",
            expected="[batch, query heads, length, head_dim], text included",
            next_step="reshape it as the queries are; at text tokens its value does not matter",
        )
    if gate.dtype != q.dtype:
        raise DtypeError(
            "the gate has another dtype than the queries",
            got=f"gate {gate.dtype}, q {q.dtype}",
            expected="one dtype",
            next_step="cast the gate with .to(q.dtype)",
        )


def _num_selected(num_tiles: Any, sparsity: Tensor) -> Tensor:
    count: Tensor = (1.0 - sparsity) * num_tiles
    return count.ceil()


def _scores(q: Tensor, k: Tensor, means: TileMeans, scale: float | None) -> Tensor:
    """Scaled products of mean queries and mean keys [batch, query heads, tiles, tiles].

    Rounded as published: means, products and quotients are in the dtype of the inputs.
    """
    queries, keys = means.of(q), per_query_head(means.of(k), q)
    scores = product(queries, keys.transpose(-1, -2))
    scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
    return means.without_empty(scores)


def _compressed(scores: Tensor, v: Tensor, tiles: VideoTiles, means: TileMeans) -> Tensor:
    """Attention among the tiles' means, for every token; zero at text tokens."""
    values = per_query_head(means.of(v), scores)
    pooled = product(scores.softmax(dim=-1), values)
    spread = spread_over_tokens(pooled, tiles.grid, tiles.tile)
    return F.pad(spread, (0, 0, tiles.before, tiles.after)) if tiles.has_text else spread


LIBRARY.impl("vsa", _vsa, "CompositeImplicitAutograd")
register_autocast_like_sdpa("vsa")
