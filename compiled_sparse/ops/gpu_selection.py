"""Selection of chunks by each query on GPUs; the kernels are imported on first use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from compiled_sparse.ops.bit_masks import words_for
from compiled_sparse.ops.video import per_query_head

_MAX_GATES: Final = 1 << 27
"""Gates that are in memory at a time, where one head has fewer."""


def select_per_query(
    q: Tensor,
    means: Tensor,
    own: Tensor,
    chunk_visible: Tensor | None,
    query_visible: Tensor | None,
    *,
    text_before: int,
    text_after: int,
    runs_before: int,
    runs_after: int,
    mode: str,
    count: int,
    threshold: float,
) -> Tensor:
    """Select for each query alone; see `compiled_sparse.ops.cpu.select_per_query`.

    Gates are float32 products, of what precision `torch.backends.cuda.matmul` says.
    """
    from compiled_sparse.kernels.chunk_selection import Selection
    from compiled_sparse.kernels.chunk_selection import select
    from compiled_sparse.kernels.launch import on_device_of

    shape = (*q.shape[:2], runs_before + means.shape[2] + runs_after, words_for(q.shape[2]))
    # Text is selected by all; rows of video are written over.
    selected = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    keys = per_query_head(means, q)
    video = q.narrow(2, text_before, q.shape[2] - text_before - text_after)
    masks = None
    if chunk_visible is not None and query_visible is not None:
        masks = (chunk_visible.contiguous(), query_visible.contiguous())
    rule: int | Tensor = count
    if mode == "threshold":
        rule = torch.full((), threshold, dtype=torch.float64, device=q.device)
    own = own.contiguous()
    with on_device_of(q):
        for b, heads in _slabs(q.shape[:2], means.shape[2] * video.shape[2]):
            gates = keys[b, heads] @ video[b, heads].to(keys.dtype).transpose(-1, -2)
            shown = None if masks is None else (masks[0][b], masks[1][b])
            select(
                Selection(gates, own, shown, text_before, runs_before),
                rule,
                selected[b, heads],
            )
    return selected


def _slabs(shape: torch.Size, gates_of_a_head: int) -> Iterator[tuple[int, slice]]:
    """Yield batch entries and heads whose gates are in memory at a time."""
    batch, heads = shape
    step = max(1, _MAX_GATES // max(1, gates_of_a_head))
    for b in range(batch):
        for start in range(0, heads, step):
            yield b, slice(start, start + step)
