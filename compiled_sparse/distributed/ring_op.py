"""Ring attention as an op: partial attention per shard of keys, merged by the log-sum-exp.

`compiled_sparse::ring_attention` is composite: tracing turns it into list ops, kernel ops and
functional collectives. The derivative is written out: keys that went round in the forward pass go
round again in the backward pass, in place of being kept. Method: arXiv 2310.01889; static patterns,
halos and text added here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_sparse.distributed.ring_call import RingCall
from compiled_sparse.distributed.ring_lists import PATTERN_SCHEMA
from compiled_sparse.distributed.ring_lists import pattern_of
from compiled_sparse.distributed.ring_passes import RingBackward
from compiled_sparse.distributed.ring_passes import ring_forward
from compiled_sparse.layout import Text
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.tensors import resolve_scale
from compiled_sparse.sharding import SequenceGroup

LIBRARY.define(
    f"ring_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, {PATTERN_SCHEMA}, int rank, "
    "str group_name, int text_before, int text_after, float? scale) -> Tensor"
)


class _Ring(torch.autograd.Function):
    """Both passes; what other ranks' keys give is never kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, call: RingCall
    ) -> Tensor:
        out, lse = ring_forward(call, q, k, v, key_mask)
        ctx.save_for_backward(q, k, v, out, lse, key_mask)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, key_mask = ctx.saved_tensors
        gradients = RingBackward(ctx.call, tuple(saved), key_mask).run(grad_out)
        return (*gradients, None, None)


def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    kind: str,
    grid: list[int],
    tile: list[int],
    windows: list[int],
    size: int,
    rank: int,
    group_name: str,
    text_before: int,
    text_after: int,
    scale: float | None,
) -> Tensor:
    call = RingCall(
        pattern=pattern_of(kind, grid, tile, windows, size),
        text=Text(text_before, text_after),
        group=SequenceGroup(group_name, size, rank),
        scale=resolve_scale(scale, q),
    )
    out: Tensor = _Ring.apply(q, k, v, key_mask, call)  # type: ignore[no-untyped-call]
    return out


LIBRARY.impl("ring_attention", _ring_attention, "CompositeImplicitAutograd")
register_autocast_like_sdpa("ring_attention")
