"""Sliding-window block attention as an op: static block lists over the kernel op.

`compiled_sparse::swba` is composite: tracing turns it into one list op and one kernel op. The whole
sequence is a grid of one axis. The pattern is that of the published Triton kernel, `attention(q, k,
v, bs, ws, sm_scale)`; any block size, a shorter last block, key masks and grouped heads added here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import swba_lists

_GEOMETRY = "SymInt length, int block, int window"

LIBRARY.define(
    f"swba_block_lists({_GEOMETRY}, Device device) -> (Tensor block_indices, Tensor block_counts)"
)
LIBRARY.define(
    f"swba(Tensor q, Tensor k, Tensor v, Tensor? key_mask, {_GEOMETRY}, float? scale) "
    "-> (Tensor out, Tensor lse)"
)


def _block_lists(
    length: int, block: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    indices, counts = swba_lists(length, block, window, device)
    # The compiler may reuse an output as scratch memory, so the cached plan is never handed out.
    return indices.clone(), counts.clone()


def _block_lists_fake(
    length: int, block: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    num_blocks = (length + block - 1) // block
    width = torch.sym_min(window, num_blocks)
    indices = torch.empty(1, 1, num_blocks, width, dtype=torch.int32, device=device)
    counts = torch.empty(1, 1, num_blocks, dtype=torch.int32, device=device)
    return indices, counts


def _swba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    length: int,
    block: int,
    window: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    ops = torch.ops.compiled_sparse
    lists = ops.swba_block_lists(length, block, window, q.device)
    grid, tile = [length], [block]
    outputs: tuple[Tensor, Tensor] = ops.block_sparse_attention(
        q, k, v, *lists, key_mask, grid, tile, tile, 0, 0, scale
    )
    return outputs


LIBRARY.impl("swba_block_lists", _block_lists, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::swba_block_lists", _block_lists_fake, lib=LIBRARY)
LIBRARY.impl("swba", _swba, "CompositeImplicitAutograd")
register_autocast_like_sdpa("swba")
