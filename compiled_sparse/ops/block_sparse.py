"""The kernel op: attention over listed pairs of blocks, forward and backward.

Tokens stay in raster order; which tokens form a block follows from grid, tile and text
(`compiled_sparse.layout`). The op is opaque to the compiler: schema, fake with exact strides,
registered backward, one implementation per device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.ops import cpu
from compiled_sparse.ops import gpu
from compiled_sparse.ops.checks import check_lists
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.checks import resolve_layouts
from compiled_sparse.ops.differentiable import define_attention
from compiled_sparse.ops.differentiable import register_attention
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.ops.routing import uses_gpu_kernels
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs
from compiled_sparse.ops.tensors import resolve_scale

FORWARD = "block_sparse_attention"

_GEOMETRY = "SymInt[] grid, int[] q_tile, int[] kv_tile, SymInt text_before, SymInt text_after"

define_attention(
    FORWARD,
    "Tensor block_indices, Tensor block_counts, Tensor? key_mask",
    f"{_GEOMETRY}, float? scale",
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    grid: Sequence[int],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    key_mask: Tensor | None = None,
    text_before: int = 0,
    text_after: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query block over its listed key blocks.

    Blocks are numbered: runs of text in front, tiles in raster order, runs of text behind; a run
    has as many slots as the tile. Arithmetic is float32 (float64 for float64 inputs); on GPUs the
    operands of products are rounded to the dtype of the inputs. A query without a visible key gives
    `out` 0 and `lse` -inf, and no gradient.

    Args:
        q: [batch, query heads, query length, head_dim]; float32, bfloat16, float16 or float64.
        k: [batch, key heads, key length, head_dim]; query heads is a multiple of key heads.
        v: like `k`.
        block_indices: int32 [batch or 1, query heads or 1, query blocks, K]: key blocks of each
            query block, without repetition.
        block_counts: int32 [batch or 1, query heads or 1, query blocks]: how many leading entries
            of a row are valid, 0 to K.
        grid: Token grid of the queries, one to three axes. With one axis the key length is free.
        q_tile: Tile sides for query blocks.
        kv_tile: Tile sides for key blocks.
        key_mask: bool [batch, key length], True where the key is attended.
        text_before: Text tokens in front of the grid, in queries and keys.
        text_after: Text tokens behind the grid, in queries and keys.
        scale: Softmax scale; None means `head_dim ** -0.5`.

    Returns:
        `out` [batch, query heads, query length, head_dim] of v's dtype, a transposed view of
        [batch, length, heads, head_dim] memory, and `lse`, the natural log-sum-exp of the scaled
        scores, float32 (float64 for float64) [batch, query heads, query length]. Both are
        differentiable once.

    Raises:
        ShapeError: if shapes do not fit each other.
        DtypeError: if dtypes are unsupported or differ.
        LayoutError: if grid and text do not add up to the lengths.
        BlockListError: if a list is out of range; checked on the CPU, and on GPUs on request only
            (`COMPILED_SPARSE_CHECK_LISTS=1`), because it makes the host wait.
        DeviceError: if the tensors are on different devices.
    """
    op = torch.ops.compiled_sparse.block_sparse_attention
    outputs: tuple[Tensor, Tensor] = op(
        q,
        k,
        v,
        block_indices,
        block_counts,
        key_mask,
        list(grid),
        list(q_tile),
        list(kv_tile),
        text_before,
        text_after,
        scale,
    )
    return outputs


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    q_tile: list[int],
    kv_tile: list[int],
    text_before: int,
    text_after: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    check_tensors(q, k, v, key_mask, (block_indices, block_counts))
    check_shapes(q, k, v, key_mask)
    layouts = resolve_layouts(q, k, grid, q_tile, kv_tile, text_before, text_after)
    check_lists(block_indices, block_counts, q, *layouts)
    arguments = (q, k, v, block_indices, block_counts, key_mask)
    scale = resolve_scale(scale, q)
    if uses_gpu_kernels(q):
        outputs = empty_outputs(q)
        gpu.block_sparse_forward(*arguments, *layouts, scale, outputs)
        return outputs
    q_tokens, kv_tokens = map(block_tokens, layouts)
    return cpu.block_sparse_forward(*arguments, q_tokens, kv_tokens, scale)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    q_tile: list[int],
    kv_tile: list[int],
    text_before: int,
    text_after: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layouts = resolve_layouts(q, k, grid, q_tile, kv_tile, text_before, text_after)
    saved = (q, k, v, out, lse, block_indices, block_counts, key_mask)
    scale = resolve_scale(scale, q)
    if uses_gpu_kernels(q):
        gradients = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
        gpu.block_sparse_backward(grad_out, grad_lse, *saved, *layouts, scale, gradients)
        return gradients
    q_tokens, kv_tokens = map(block_tokens, layouts)
    return cpu.block_sparse_backward(grad_out, grad_lse, *saved, q_tokens, kv_tokens, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    check_tensors(q, k, v, rest[0], (block_indices, block_counts))
    return empty_outputs(q)


register_attention(FORWARD, num_tensors=3, forward=_forward, backward=_backward, fake=_forward_fake)
