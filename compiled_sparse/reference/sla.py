"""Sparse-linear attention, densely: blocks compared by their means, and a linear branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Literal
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.config_sla import SLA
from compiled_sparse.config_sla import SageSLA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.reference.blocks import attention_over_blocks
from compiled_sparse.reference.blocks import block_of_token
from compiled_sparse.reference.quantized import quantized_attention_over_blocks
from compiled_sparse.sparsity import truncated_top_k

if TYPE_CHECKING:
    from collections.abc import Mapping

Projection = tuple[Tensor, Tensor | None]

_SMALLEST_SUM = 1e-5


def sla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLA,
    *,
    grid_thw: tuple[int, ...],
    text: Text | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    proj: Projection | None = None,
    runtime: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense masked attention over the selected blocks, plus the projected linear attention.

    Rounded to the dtype of the inputs wherever published code does: what selects blocks, and in
    the linear branch features, sums, quotients and projections. The linear branch of float16 inputs
    is float32, as its sums may be beyond float16.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: Like `k`.
        config: The config.
        grid_thw: Token grid of the video; for blocks that are runs, the length of the sequence.
        text: Text tokens around the video.
        key_mask: bool [batch, length]; a hidden token is in no mean and no sum either.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        proj: Weight [head_dim, head_dim] and bias of the projection behind the linear branch.
        runtime: Nothing that this mechanism reads.

    Returns:
        The output in v's dtype, and the log-sum-exp of the sparse branch.
    """
    text = text or Text()
    groups = q.shape[1] // k.shape[1]
    blocks = _Blocks.of(config, grid_thw, text)
    lists = blocks.lists(q, k.repeat_interleave(groups, dim=1), config.topk_ratio, key_mask)
    out, lse = _sparse(q, k, v, config, blocks, lists, key_mask, scale)
    if proj is None or config.proj is None:
        return out, lse
    k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    linear = linear_attention(q, k, v, config.feature_map, proj, key_mask)
    return (out.to(linear.dtype) + linear).to(v.dtype), lse


def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLA,
    blocks: _Blocks,
    lists: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    if isinstance(config, SageSLA):
        held = "float8" if config.values == "auto" else config.values
        return quantized_attention_over_blocks(
            q,
            k,
            v,
            blocks.queries,
            blocks.keys,
            *lists,
            key_mask=key_mask,
            scale=scale,
            values=cast('Literal["float8", "float16"]', held),
        )
    return attention_over_blocks(
        q, k, v, blocks.queries, *lists, key_layout=blocks.keys, key_mask=key_mask, scale=scale
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    proj: Projection,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Projected attention of feature maps over all visible keys, rounded after every step.

    Args:
        q: [batch, heads, queries, head_dim].
        k: [batch, heads, keys, head_dim].
        v: Like `k`.
        feature_map: "softmax", "elu" or "relu".
        proj: Weight [head_dim, head_dim] and bias.
        key_mask: bool [batch, keys].

    Returns:
        [batch, heads, queries, head_dim] in the dtype of the inputs, float32 for float16.
    """
    work = torch.float32 if q.dtype == torch.float16 else q.dtype
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x.to(work).to(wide)

    if key_mask is not None:
        k, v = (each.masked_fill(~key_mask[:, None, :, None], 0.0) for each in (k, v))
    queries, keys = (rounded(feature(each, feature_map)) for each in (q, k))
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask[:, None, :, None], 0.0)
    products = rounded(keys.mT @ v.to(wide))
    sums = rounded(keys.sum(dim=-2, keepdim=True))
    weights = rounded(rounded(rounded(queries * sums).sum(-1, keepdim=True)) + _SMALLEST_SUM)
    mixed = rounded(rounded(queries @ products) / weights)
    weight, bias = proj
    projected = mixed @ rounded(weight).mT
    return (projected if bias is None else projected + rounded(bias)).to(work)


def feature(x: Tensor, feature_map: str) -> Tensor:
    """Return what a feature map makes of each token: nothing below zero.

    In the dtype of x, as published: elu is rounded before one is added to it.
    """
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    return F.elu(x) + 1.0 if feature_map == "elu" else x.relu()


@dataclass(frozen=True)
class _Blocks:
    """How one sequence is cut into blocks of queries and of keys."""

    queries: BlockLayout
    keys: BlockLayout

    @staticmethod
    def of(config: SLA, grid: tuple[int, ...], text: Text) -> _Blocks:
        tiles = (config.resolve_tile(grid), config.key_tile)
        return _Blocks(*(BlockLayout(grid, tile, text.before, text.after) for tile in tiles))

    def lists(
        self, q: Tensor, k: Tensor, ratio: float, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows of key blocks: the best, of equal ones the first, and all text; text sees all."""
        scores = self._scores(q, k, key_mask)
        count = truncated_top_k(self.keys.num_video_blocks, ratio)
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        shape = (*scores.shape[:2], self.queries.num_blocks, self.keys.num_blocks)
        seen = torch.ones(shape, dtype=torch.bool, device=scores.device)
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
        seen[:, :, _video(self.queries)[:, None], _video(self.keys)] = selected
        # True before False, each in order: the listed blocks come first, ascending.
        indices = seen.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
        return indices.to(torch.int32), seen.sum(-1).to(torch.int32)

    def _scores(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Products of means of queries and of keys less their mean, in the inputs' dtype."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        visible = torch.ones(q.shape[0], q.shape[2], device=q.device)
        visible = visible.to(wide) if key_mask is None else key_mask.to(wide)
        if key_mask is not None:
            q, k = (each.masked_fill(~key_mask[:, None, :, None], 0.0) for each in (q, k))
        total = visible.sum(-1).clamp(min=1.0)[:, None, None, None]
        mean = (k.to(wide).sum(dim=-2, keepdim=True) / total).to(k.dtype)
        queries, _ = _means(q, self.queries, visible)
        keys, shown = _means(k - mean, self.keys, visible)
        scores = (queries.to(wide) @ keys.to(wide).mT).to(q.dtype)
        return scores.masked_fill((shown == 0)[:, None, None, :], torch.finfo(q.dtype).min)


def _video(layout: BlockLayout) -> Tensor:
    """Numbers of the blocks that are tiles of the video."""
    first = layout.num_text_blocks_before
    return torch.arange(first, first + layout.num_video_blocks)


def _means(x: Tensor, layout: BlockLayout, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the visible tokens of each tile, in x's dtype, and how many those are."""
    members = (block_of_token(layout) == _video(layout)[:, None]).to(x.device)
    shares = members.to(visible.dtype) * visible[:, None, :]
    shown = shares.sum(-1)
    sums = shares[:, None] @ x.to(visible.dtype)
    return (sums / shown.clamp(min=1.0)[:, None, :, None]).to(x.dtype), shown
