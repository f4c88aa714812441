"""Made-up queries, keys and values that look a little like a video's: smooth, with noise.

For pictures and measurements of mechanisms that choose by content. They say nothing about a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.layout import Text

_COARSENESS = 4
_SHARED = 0.5
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def smooth_tokens(
    grid: tuple[int, ...], heads: int, head_dim: int, generator: torch.Generator
) -> Tensor:
    """Return tokens that vary smoothly over a grid, with noise on top.

    Args:
        grid: Tokens per axis, one to three axes.
        heads: Number of heads.
        head_dim: Channels of a head.
        generator: Where the numbers come from.

    Returns:
        float32 [1, heads, tokens, head_dim] in raster order.
    """
    sides = [max(1, side // _COARSENESS) for side in grid]
    coarse = torch.randn(heads, head_dim, *sides, generator=generator)
    field = F.interpolate(coarse, grid, mode=_MODES[len(grid)]).flatten(2).transpose(1, 2)
    return (2 * field + 0.5 * torch.randn(field.shape, generator=generator))[None]


def made_up_tokens(
    grid: tuple[int, ...], heads: int, head_dim: int, *, text: Text | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values; queries and keys of a place have a part in common.

    So a token looks for its neighbours, and for what happens to be like it elsewhere. Text is
    noise.

    Args:
        grid: Tokens per axis of the video.
        heads: Number of heads.
        head_dim: Channels of a head.
        text: Text tokens around the video.
        seed: The same seed gives the same numbers.

    Returns:
        Three tensors, float32 [1, heads, length, head_dim].
    """
    text = text or Text()
    generator = torch.Generator().manual_seed(seed)
    q, k, v, shared = (smooth_tokens(grid, heads, head_dim, generator) for _ in range(4))
    tensors = []
    for video in (q + _SHARED * shared, k + _SHARED * shared, v):
        shape = (1, heads, text.before + text.after, head_dim)
        around = torch.randn(shape, generator=generator).split([text.before, text.after], dim=2)
        tensors.append(torch.cat([around[0], video, around[1]], dim=2))
    return tensors[0], tensors[1], tensors[2]
