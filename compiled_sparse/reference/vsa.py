"""Video sparse attention, densely: tiles compared by their means, and a compressed branch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiled_sparse.config_vsa import UNGATED
from compiled_sparse.config_vsa import VSA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.reference.blocks import attention_over_blocks
from compiled_sparse.reference.blocks import block_of_token
from compiled_sparse.sparsity import num_selected

if TYPE_CHECKING:
    from collections.abc import Mapping


def vsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: VSA,
    *,
    grid_thw: tuple[int, ...],
    text: Text | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    gate: Tensor | None = None,
    runtime: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense masked attention over the selected tiles, plus the gated attention among means.

    Means and scores are rounded to the dtype of the inputs, because they decide what is selected;
    all else is float32, or float64 for float64.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: Like `k`.
        config: The config.
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
        key_mask: bool [batch, length]; a hidden token is in no mean either.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        gate: Like `q`.
        runtime: Nothing that this mechanism reads.

    Returns:
        The output in v's dtype, and the log-sum-exp of the sparse branch.
    """
    text = text or Text()
    layout = BlockLayout(grid_thw, config.resolve_tile(grid_thw), text.before, text.after)
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    tiles = _Tiles(layout, q, key_mask)
    scores = tiles.scores(q, k, scale)
    lists = _lists(scores, layout, num_selected(layout.num_video_blocks, config.sparsity))
    out, lse = attention_over_blocks(q, k, v, layout, *lists, key_mask=key_mask, scale=scale)
    if gate is None and config.gate != UNGATED:
        return out, lse
    compressed = tiles.compressed(scores, v)
    weighted = compressed if gate is None else compressed * gate.to(compressed.dtype)
    return (out.to(compressed.dtype) + weighted).to(v.dtype), lse


class _Tiles:
    """Membership of the video's tokens, as a matrix [batch or 1, tiles, length]."""

    def __init__(self, layout: BlockLayout, q: Tensor, key_mask: Tensor | None) -> None:
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        first = layout.num_text_blocks_before
        tiles = torch.arange(first, first + layout.num_video_blocks)
        members = (block_of_token(layout) == tiles[:, None])[None].to(q.device)
        self.members = members.to(self.compute)
        visible = members if key_mask is None else members & key_mask[:, None, :]
        self.visible = visible.to(self.compute)
        self.shown = self.visible.sum(-1)

    def means(self, x: Tensor) -> Tensor:
        """Means of the visible tokens [batch, heads, tiles, head_dim], in x's dtype."""
        x = x.to(self.compute)
        if self.visible.shape[0] > 1 or (self.visible != self.members).any():
            x = x.masked_fill((self.visible.sum(1) == 0)[:, None, :, None], 0.0)
        sums = self.visible[:, None] @ x
        return sums / self.shown.clamp(min=1.0)[:, None, :, None]

    def scores(self, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        """Scores [batch, heads, tiles, tiles] in the dtype of the inputs."""
        queries, keys = (self.means(each).to(q.dtype).to(self.compute) for each in (q, k))
        products = (queries @ keys.transpose(-1, -2)).to(q.dtype)
        scores = products / math.sqrt(q.shape[-1]) if scale is None else products * scale
        return scores.masked_fill((self.shown == 0)[:, None, None, :], torch.finfo(q.dtype).min)

    def compressed(self, scores: Tensor, v: Tensor) -> Tensor:
        """The compressed branch of every token; zero for text."""
        weights = scores.to(self.compute).softmax(dim=-1)
        pooled = weights @ self.means(v).to(v.dtype).to(self.compute)
        return self.members[0].T @ pooled


def _lists(scores: Tensor, layout: BlockLayout, count: int) -> tuple[Tensor, Tensor]:
    """Rows of blocks: the best tiles, of equal ones the first, and all text; text sees all."""
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    before, tiles = layout.num_text_blocks_before, layout.num_video_blocks
    shape = (*scores.shape[:2], layout.num_blocks, layout.num_blocks)
    seen = torch.ones(shape, dtype=torch.bool, device=scores.device)
    video = slice(before, before + tiles)
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    seen[:, :, video, video] = selected
    counts = seen.sum(-1)
    # True before False, each in order: the listed blocks come first, ascending.
    indices = seen.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return indices.to(torch.int32), counts.to(torch.int32)
