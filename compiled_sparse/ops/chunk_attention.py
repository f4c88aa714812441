"""The second kernel op: attention of every query over the chunks that it selects itself.

Like `block_sparse_attention` but for the selection, which is one bit for each (query, chunk)
instead of a list for each block of queries: the work grows with the selected pairs of query and
chunk. Chunks are the blocks of `compiled_sparse.layout`, of any size; tokens stay in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.errors import BlockListError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import cpu
from compiled_sparse.ops import gpu_chunks
from compiled_sparse.ops.bit_masks import words_for
from compiled_sparse.ops.checks import check_length
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.differentiable import define_attention
from compiled_sparse.ops.differentiable import register_attention
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.ops.routing import uses_gpu_kernels
from compiled_sparse.ops.tensors import empty_like_blhd
from compiled_sparse.ops.tensors import empty_outputs
from compiled_sparse.ops.tensors import resolve_scale

NAME = "chunk_sparse_attention"

define_attention(
    NAME,
    "Tensor selected, Tensor? key_mask",
    "SymInt[] grid, int[] tile, SymInt text_before, SymInt text_after, float? scale",
)


def chunk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    *,
    grid: Sequence[int],
    tile: Sequence[int],
    key_mask: Tensor | None = None,
    text_before: int = 0,
    text_after: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its selected chunks.

    Chunks are numbered: runs of text in front, tiles in raster order, runs of text behind; a run
    has as many slots as the tile. Nothing is selected but what `selected` says: text and the
    query's own chunk have bits like all others. Arithmetic is float32 (float64 for float64
    inputs); on GPUs the operands of products are rounded to the dtype of the inputs. A query
    without a visible key gives `out` 0 and `lse` -inf, and no gradient.

    Args:
        q: [batch, query heads, length, head_dim]; float32, bfloat16, float16 or float64.
        k: [batch, key heads, length, head_dim]; query heads is a multiple of key heads.
        v: like `k`.
        selected: int32 [batch, query heads, chunks, ceil(length / 32)]: bit i of word w tells
            whether query 32 w + i attends to the chunk; bits past the length do not matter.
        grid: Token grid, one to three axes.
        tile: Sides of a chunk.
        key_mask: bool [batch, length], True where the key is attended.
        text_before: Text tokens in front of the grid.
        text_after: Text tokens behind the grid.
        scale: Softmax scale; None means `head_dim ** -0.5`.

    Returns:
        `out` [batch, query heads, length, head_dim] of v's dtype, a transposed view of
        [batch, length, heads, head_dim] memory, and `lse`, the natural log-sum-exp of the scaled
        scores, float32 (float64 for float64) [batch, query heads, length]. Both are
        differentiable once, for a fixed selection.

    Raises:
        ShapeError: if shapes do not fit each other.
        DtypeError: if dtypes are unsupported or differ.
        LayoutError: if grid and text do not add up to the length.
        BlockListError: if the selection has another shape or dtype.
        DeviceError: if the tensors are on different devices.
    """
    outputs: tuple[Tensor, Tensor] = torch.ops.compiled_sparse.chunk_sparse_attention(
        q, k, v, selected, key_mask, list(grid), list(tile), text_before, text_after, scale
    )
    return outputs


def _layout(grid: list[int], tile: list[int], before: int, after: int) -> BlockLayout:
    return BlockLayout(tuple(grid), tuple(tile), before, after)


def _check(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, key_mask: Tensor | None, layout: BlockLayout
) -> None:
    check_tensors(q, k, v, key_mask, (selected,))
    check_shapes(q, k, v, key_mask)
    check_length("q", q, layout)
    check_length("k", k, layout)
    expected = (*q.shape[:2], layout.num_blocks, words_for(q.shape[2]))
    if tuple(selected.shape) != expected or selected.dtype != torch.int32:
        raise BlockListError(
            "the selection does not fit the queries and chunks",
            got=f"{selected.dtype} of shape {tuple(selected.shape)}",
            expected=f"torch.int32 of shape {expected}: a bit for each query in each chunk's row",
            next_step="pack a mask [batch, heads, chunks, length] with ops.pack_bits",
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    text_before: int,
    text_after: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    layout = _layout(grid, tile, text_before, text_after)
    _check(q, k, v, selected, key_mask, layout)
    scale = resolve_scale(scale, q)
    if uses_gpu_kernels(q):
        outputs = empty_outputs(q)
        gpu_chunks.chunk_forward(q, k, v, selected, key_mask, layout, scale, outputs)
        return outputs
    return cpu.chunk_forward(q, k, v, selected, key_mask, block_tokens(layout), scale)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    tile: list[int],
    text_before: int,
    text_after: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(grid, tile, text_before, text_after)
    saved = (q, k, v, out, lse, selected, key_mask)
    scale = resolve_scale(scale, q)
    if uses_gpu_kernels(q):
        gradients = empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)
        gpu_chunks.chunk_backward(grad_out, grad_lse, *saved, layout, scale, gradients)
        return gradients
    return cpu.chunk_backward(grad_out, grad_lse, *saved, block_tokens(layout), scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_tensors(q, k, v, rest[0], (selected,))
    return empty_outputs(q)


register_attention(NAME, num_tensors=2, forward=_forward, backward=_backward, fake=_fake)
