"""Small things every rank gets from all: masks, statistics of heads, sums.

All are composite: tracing turns each into one functional collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compiled_sparse.ops.collectives import all_to_all
from compiled_sparse.ops.library import LIBRARY

LIBRARY.define(
    "gather_mask(Tensor mask, str group, int size, SymInt num_video, SymInt text_before, "
    "SymInt text_after) -> Tensor"
)
LIBRARY.define("join_heads(Tensor values, str group, int rank, int[] heads) -> Tensor")
LIBRARY.define("sum_over_ranks(Tensor values, str group) -> Tensor")


def _gather_mask(
    mask: Tensor, group: str, size: int, num_video: int, text_before: int, text_after: int
) -> Tensor:
    """Return a mask over all tokens.

    Args:
        mask: [..., rows] over this rank's, bool or of a floating dtype.
        group: The process group's name.
        size: Its number of processes.
        num_video: Tokens of the whole video.
        text_before: Rows of text in front of the video's, the same on all ranks.
        text_after: Rows of text behind them.

    Returns:
        [..., text_before + num_video + text_after].
    """
    end = mask.shape[-1] - text_after
    run = mask[..., text_before:end]
    sent = run.to(torch.uint8) if mask.dtype == torch.bool else run
    counts = [run.numel()] * size
    received = all_to_all(sent.flatten().repeat(size), counts, counts, group)
    video = received.view(size, *run.shape).movedim(0, -2).flatten(-2)[..., :num_video]
    return torch.cat([mask[..., :text_before], video.to(mask.dtype), mask[..., end:]], -1)


def _join_heads(values: Tensor, group: str, rank: int, heads: Sequence[int]) -> Tensor:
    """Return what was measured of all heads.

    Args:
        values: [..., this rank's heads, numbers]; of a rank without heads what it has is left out.
        group: The process group's name.
        rank: This process's place in it.
        heads: How many each rank has.

    Returns:
        [..., all heads, numbers].
    """
    own = values.narrow(-2, 0, heads[rank]).movedim(-2, 0)
    one = values.narrow(-2, 0, 1).numel()
    sent = own.flatten().repeat(len(heads))
    counts = [count * one for count in heads]
    received = all_to_all(sent, counts, [counts[rank]] * len(heads), group)
    return received.view(sum(heads), *own.shape[1:]).movedim(0, -2)


def _sum_over_ranks(values: Tensor, group: str) -> Tensor:
    ops = torch.ops._c10d_functional
    total: Tensor = ops.wait_tensor(ops.all_reduce(values.contiguous(), "sum", group))
    return total


LIBRARY.impl("gather_mask", _gather_mask, "CompositeImplicitAutograd")
LIBRARY.impl("join_heads", _join_heads, "CompositeImplicitAutograd")
LIBRARY.impl("sum_over_ranks", _sum_over_ranks, "CompositeImplicitAutograd")
