"""Sparse-linear attention as ops: top-k lists over a kernel op, and a linear branch.

`compiled_sparse::sla` and `compiled_sparse::sage_sla`, whose kernel op is quantised, are composite:
tracing turns means, scores and the linear branch into ordinary operations around one selection op
and one kernel op. Method: arXiv 2509.24006; blocks on a video grid, text, key masks, grouped heads
and tail blocks of any length added here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_sparse.errors import ShapeError
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.linear_attention import linear_attention
from compiled_sparse.ops.quantization import key_mean
from compiled_sparse.ops.tensors import product
from compiled_sparse.ops.video import VideoTiles
from compiled_sparse.ops.video import best_tiles
from compiled_sparse.ops.video import check_given_sparsity
from compiled_sparse.ops.video import per_query_head
from compiled_sparse.ops.video import with_text
from compiled_sparse.sparsity import RATIO_DIGITS
from compiled_sparse.sparsity import truncated_top_k

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask"
_REST = (
    "SymInt[] grid, int[] q_tile, int[] kv_tile, SymInt text_before, SymInt text_after, "
    "float topk_ratio, str feature_map, Tensor? given_sparsity, Tensor? proj_weight, "
    "Tensor? proj_bias, float? scale"
)

LIBRARY.define(f"sla({_INPUTS}, {_REST}) -> (Tensor out, Tensor lse)")
LIBRARY.define(f"sage_sla({_INPUTS}, str values, {_REST}) -> (Tensor out, Tensor lse)")


def _sla(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *rest: Any) -> Any:
    op = torch.ops.compiled_sparse.block_sparse_attention
    return _attend(op, (), q, k, v, key_mask, *rest)


def _sage_sla(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, values: str, *rest: Any
) -> Any:
    op = torch.ops.compiled_sparse.quantized_block_sparse_attention
    return _attend(op, (values,), q, k, v, key_mask, *rest)


def _attend(
    sparse_attention: Any,
    settings: tuple[str, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    q_tile: list[int],
    kv_tile: list[int],
    text_before: int,
    text_after: int,
    topk_ratio: float,
    feature_map: str,
    given_sparsity: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Do what both ops do around their kernel op, which takes `settings` behind the scale."""
    _check_projection(q, proj_weight, proj_bias)
    text = (text_before, text_after)
    tiles = VideoTiles(grid, q_tile, *text), VideoTiles(grid, kv_tile, *text)
    lists = _block_lists(q, k, v, key_mask, tiles, topk_ratio, given_sparsity)
    geometry = (grid, q_tile, kv_tile, *text)
    out, lse = sparse_attention(q, k, v, *lists, key_mask, *geometry, scale, *settings)
    if proj_weight is not None:
        linear = linear_attention(q, k, v, key_mask, feature_map, proj_weight, proj_bias)
        out = (out + linear).to(out.dtype)
    return out, lse


def _block_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    tiles: tuple[VideoTiles, VideoTiles],
    topk_ratio: float,
    given_sparsity: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tiles[0].check(q, k, v, key_mask)
    check_given_sparsity(given_sparsity)
    share = topk_ratio if given_sparsity is None else _ratio_at(given_sparsity)
    scores = block_scores(q.detach(), k.detach(), key_mask, *tiles)
    return with_text(best_tiles(scores, share, truncated_top_k, _truncated_top_k), *tiles)


def _ratio_at(sparsity: Tensor) -> Tensor:
    ratio: Tensor = ((1.0 - sparsity) * 10**RATIO_DIGITS).round() / 10**RATIO_DIGITS
    return ratio


def _truncated_top_k(num_tiles: Any, ratio: Tensor) -> Tensor:
    count: Tensor = ratio * num_tiles
    return count.floor()


def block_scores(
    q: Tensor, k: Tensor, key_mask: Tensor | None, queries: VideoTiles, keys: VideoTiles
) -> Tensor:
    """Products of mean queries and mean keys [batch, query heads, query tiles, key tiles].

    Rounded as published: all is in the dtype of the inputs. The mean key is taken off first, which
    in exact arithmetic would change no ranking.
    """
    smooth = k - key_mean(k, key_mask)
    means = keys.means(key_mask, k)
    pooled = queries.means(key_mask, q).of(q), per_query_head(means.of(smooth), q)
    return means.without_empty(product(pooled[0], pooled[1].transpose(-1, -2)))


def _check_projection(q: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    given = [each for each in (weight, bias) if each is not None]
    sizes = [tuple(each.shape) for each in given]
    head_dim = q.shape[-1]
    expected = [(head_dim, head_dim), (head_dim,)][: len(given)]
    if (weight is None and bias is not None) or sizes != expected:
        raise ShapeError(
            "the projection does not fit the heads",
            got=f"weight {'None' if weight is None else tuple(weight.shape)}, "
            f"bias {'None' if bias is None else tuple(bias.shape)}",
            expected=f"weight [head_dim, head_dim] = {(head_dim, head_dim)}, bias [head_dim]",
            next_step="pass weight and bias of nn.Linear(head_dim, head_dim)",
        )


for _name, _op in (("sla", _sla), ("sage_sla", _sage_sla)):
    LIBRARY.impl(_name, _op, "CompositeImplicitAutograd")
    register_autocast_like_sdpa(_name)
