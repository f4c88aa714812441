"""Mixture-of-block attention as an op: a selection op and the kernel op for what it selects.

`compiled_sparse::vmoba` is composite. Method: arXiv 2506.23858.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.ops import chunk_attention as _kernel_op  # noqa: F401 - defines the op
from compiled_sparse.ops import chunk_selection as _selection_op  # noqa: F401 - defines the op
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.video import VideoTiles

LIBRARY.define(
    "vmoba(Tensor q, Tensor k, Tensor v, Tensor? key_mask, SymInt[] grid, int[] tile, "
    "SymInt text_before, SymInt text_after, str mode, str groups, int topk, float threshold, "
    "float? scale) -> (Tensor out, Tensor lse)"
)


def _vmoba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    text_before: int,
    text_after: int,
    mode: str,
    groups: str,
    topk: int,
    threshold: float,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    VideoTiles(grid, tile, text_before, text_after).check(q, k, v, key_mask)
    geometry = (grid, tile, text_before, text_after)
    ops = torch.ops.compiled_sparse
    selected = ops.select_chunks(
        q.detach(), k.detach(), key_mask, *geometry, mode, groups, topk, threshold
    )
    outputs: tuple[Tensor, Tensor] = ops.chunk_sparse_attention(
        q, k, v, selected, key_mask, *geometry, scale
    )
    return outputs


LIBRARY.impl("vmoba", _vmoba, "CompositeImplicitAutograd")
register_autocast_like_sdpa("vmoba")
