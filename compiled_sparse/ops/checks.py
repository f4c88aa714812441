"""Argument checks of the kernel ops: plain integers only, a few microseconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from compiled_sparse.errors import BlockListError
from compiled_sparse.errors import DeviceError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import gpu
from compiled_sparse.registry import Capabilities

CHECK_LISTS_VARIABLE: Final = "COMPILED_SPARSE_CHECK_LISTS"
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 512

KERNEL_CAPABILITIES = Capabilities(
    dtypes=frozenset(SUPPORTED_DTYPES),
    max_head_dim=MAX_HEAD_DIM,
    gpu_dtypes=frozenset(gpu.DTYPES),
    gpu_max_head_dim=gpu.MAX_HEAD_DIM,
    devices=frozenset({"cpu", "cuda"}),
)
"""What every mechanism built on `block_sparse_attention` takes."""


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, block_lists: tuple[Tensor, ...]
) -> None:
    """Check ranks, dtypes and devices: valid for fake tensors too, adds no guard.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        key_mask: Key mask, if any.
        block_lists: Indices and counts, if any.

    Raises:
        ShapeError: if a tensor has the wrong rank.
        DtypeError: if dtypes differ or are not supported.
        DeviceError: if the tensors are on different devices.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(name, tensor)
    if q.dtype not in SUPPORTED_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(
            "q, k and v have unsupported or different dtypes",
            got=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            expected="one dtype among " + ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES),
            next_step="cast q, k and v to one of these",
        )
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise DtypeError(
            "key_mask is not boolean",
            got=str(key_mask.dtype),
            expected="torch.bool, True where the key is attended",
            next_step="pass key_mask=(mask != 0) or compare with your padding value",
        )
    devices = {t.device for t in (q, k, v, key_mask, *block_lists) if t is not None}
    if len(devices) > 1:
        raise DeviceError(
            "tensors are on different devices",
            got=", ".join(sorted(str(device) for device in devices)),
            expected="q, k, v, key_mask and block lists on one device",
            next_step=f"move them to {q.device}",
        )


def check_rank(
    name: str,
    tensor: Tensor,
    *,
    axes: str = "[batch, heads, length, head_dim]",
    after_heads: str = "length",
) -> None:
    """Check that a tensor has four axes.

    Args:
        name: What the caller calls it.
        tensor: The tensor; a fake one will do.
        axes: Its four axes, for the message.
        after_heads: What comes after the heads, for the message.

    Raises:
        ShapeError: if it has not.
    """
    if tensor.dim() != 4:
        raise ShapeError(
            f"{name} has the wrong rank",
            got=f"{name} of shape {tuple(tensor.shape)}",
            expected=axes,
            next_step=f"reshape {name}; heads come before {after_heads}",
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Check that the ops take a tensor's dtype.

    Raises:
        DtypeError: if they do not.
    """
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise DtypeError(
            f"{name} has an unsupported dtype",
            got=str(tensor.dtype),
            expected="one dtype among " + ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES),
            next_step=f"cast {name} to one of these",
        )


def check_length(name: str, tensor: Tensor, layout: BlockLayout) -> None:
    """Check that a tensor [batch, heads, length, head_dim] is as long as its layout says.

    Raises:
        LayoutError: if it is not.
    """
    if tensor.shape[2] != layout.num_tokens:
        raise LayoutError(
            f"grid and text do not add up to the length of {name}",
            got=f"{name} of length {tensor.shape[2]}, grid {layout.grid}, "
            f"text {layout.text_before} before and {layout.text_after} after",
            expected=f"length {layout.num_tokens}",
            next_step="pass the grid in tokens after patching, and the text token counts",
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Check that the sizes of real tensors fit each other.

    Raises:
        ShapeError: if they do not.
    """
    batch, heads, _, head_dim = q.shape
    fits = (
        k.shape == v.shape
        and k.shape[0] == batch
        and k.shape[3] == head_dim
        and k.shape[1] > 0
        and heads % k.shape[1] == 0
        and 0 < head_dim <= MAX_HEAD_DIM
    )
    if not fits:
        raise ShapeError(
            "q, k and v do not fit each other",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            expected="q [B, Hq, Lq, D], k and v [B, Hk, Lk, D] with Hq a multiple of Hk and "
            f"D at most {MAX_HEAD_DIM}",
            next_step="check the order of the axes; heads come before length",
        )
    if key_mask is not None and tuple(key_mask.shape) != (batch, k.shape[2]):
        raise ShapeError(
            "key_mask has the wrong shape",
            got=str(tuple(key_mask.shape)),
            expected=f"[batch, key length] = {(batch, k.shape[2])}",
            next_step="pass one boolean per key, without head or query axes",
        )


def resolve_layouts(
    q: Tensor,
    k: Tensor,
    grid: Sequence[int],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    text_before: int,
    text_after: int,
) -> tuple[BlockLayout, BlockLayout]:
    """Return the layouts of queries and keys.

    A grid of one axis describes the queries; the keys then have a one-axis grid of their own
    length. With more axes both sequences lie on the same grid.

    Raises:
        LayoutError: if a sequence is not as long as its layout says.
    """
    text = text_before + text_after
    kv_grid = (k.shape[2] - text,) if len(grid) == 1 else tuple(grid)
    q_layout = BlockLayout(tuple(grid), tuple(q_tile), text_before, text_after)
    kv_layout = BlockLayout(kv_grid, tuple(kv_tile), text_before, text_after)
    check_length("q", q, q_layout)
    check_length("k", k, kv_layout)
    return q_layout, kv_layout


def check_lists(
    block_indices: Tensor,
    block_counts: Tensor,
    q: Tensor,
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
) -> None:
    """Check shape and dtype of block lists; on the CPU, or on request, their range too.

    On a GPU the range is checked where COMPILED_SPARSE_CHECK_LISTS is 1, because the host then has
    to wait for the device.

    Raises:
        DtypeError: if a list is not int32.
        ShapeError: if a list has the wrong shape.
        BlockListError: if a count or an index is out of range.
    """
    if block_indices.dtype != torch.int32 or block_counts.dtype != torch.int32:
        raise DtypeError(
            "block lists are not int32",
            got=f"block_indices {block_indices.dtype}, block_counts {block_counts.dtype}",
            expected="torch.int32",
            next_step="convert them with .to(torch.int32)",
        )
    allowed = {(b, h) for b in (1, q.shape[0]) for h in (1, q.shape[1])}
    shape = tuple(block_counts.shape)
    rows_fit = len(shape) == 3 and shape[:2] in allowed and shape[2] == q_layout.num_blocks
    if not rows_fit or tuple(block_indices.shape[:-1]) != shape:
        raise ShapeError(
            "block lists have the wrong shape",
            got=f"block_indices {tuple(block_indices.shape)}, block_counts {shape}",
            expected=f"[1 or {q.shape[0]}, 1 or {q.shape[1]}, {q_layout.num_blocks}, K] and the "
            "same without K",
            next_step="one row per query block: text runs, tiles in raster order, text runs",
        )
    if not block_indices.is_cuda or os.environ.get(CHECK_LISTS_VARIABLE) == "1":
        _check_list_range(block_indices, block_counts, kv_layout.num_blocks)


def _check_list_range(block_indices: Tensor, block_counts: Tensor, num_blocks: int) -> None:
    width = block_indices.shape[-1]
    if block_counts.numel() and (int(block_counts.min()) < 0 or int(block_counts.max()) > width):
        raise BlockListError(
            "block_counts is out of range",
            got=f"{int(block_counts.min())} to {int(block_counts.max())}",
            expected=f"0 to {width}, the width of block_indices",
            next_step="count only the valid leading entries of each row",
        )
    if not block_indices.numel():
        return
    listed = torch.arange(width, device=block_counts.device) < block_counts[..., None]
    wrong = listed & ((block_indices < 0) | (block_indices >= num_blocks))
    if bool(wrong.any()):
        raise BlockListError(
            "block_indices points outside the key blocks",
            got=f"index {int(block_indices[wrong][0])}",
            expected=f"0 to {num_blocks - 1}",
            next_step="check the tile and grid the lists were made for",
        )
