"""Dense attention under the mask that lists of blocks stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.layout import BlockLayout


def block_of_token(layout: BlockLayout) -> Tensor:
    """Return the block each token of a sequence belongs to, int64 [length]."""
    size = layout.block_size
    before = torch.arange(layout.text_before) // size
    after = torch.arange(layout.text_after) // size
    tokens = torch.arange(layout.num_video_tokens)
    tile_index = torch.zeros_like(tokens)
    stride = layout.num_video_tokens
    for extent, side, tiles in zip(layout.grid, layout.tile, layout.tiles_per_axis, strict=True):
        stride //= extent
        tile_index = tile_index * tiles + tokens // stride % extent // side
    video = tile_index + layout.num_text_blocks_before
    first_after = layout.num_text_blocks_before + layout.num_video_blocks
    return torch.cat([before, video, after + first_after])


def attention_over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    key_layout: BlockLayout | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token over the tokens of its block's listed blocks.

    Values at masked keys never matter, even NaN.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: like `k`.
        layout: How the sequence is cut into blocks.
        block_indices: int32 [batch or 1, query heads or 1, blocks, K].
        block_counts: int32 [batch or 1, query heads or 1, blocks].
        key_layout: How the sequence is cut into blocks of keys; None means as the queries are.
        key_mask: bool [batch, length], True where the key is attended.
        scale: Softmax scale; None means `head_dim ** -0.5`.

    Returns:
        The output in v's dtype, and the natural log-sum-exp in the dtype of the arithmetic.
    """
    key_layout = key_layout or layout
    listed = torch.arange(block_indices.shape[-1], device=q.device) < block_counts[..., None]
    # Unlisted entries point at one block too many, which is cut off.
    num_blocks = key_layout.num_blocks
    targets = torch.where(listed, block_indices.long(), num_blocks)
    seen = torch.zeros(*targets.shape[:-1], num_blocks + 1, dtype=torch.bool).to(q.device)
    seen = seen.scatter(-1, targets, True)[..., :num_blocks]
    rows, columns = (block_of_token(each).to(q.device) for each in (layout, key_layout))
    mask = seen[..., rows, :][..., columns]
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
        k, v = (each.masked_fill(~key_mask[:, None, :, None], 0.0) for each in (k, v))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    keys, values = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = scale * (q.to(compute) @ keys.to(compute).transpose(-1, -2))
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (weights @ values.to(compute)).to(v.dtype), lse
