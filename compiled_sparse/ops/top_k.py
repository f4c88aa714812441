"""The k best key blocks of every query block, as the lists the kernel op takes.

`torch.topk` leaves open which of equal scores it takes, and sorts by score; lists have to be the
same on every device, and ascending. The op is opaque: selection is no arithmetic that a compiler
could fuse, and Inductor would call a library for it too. `torch.library.triton_op` would let it
see the Triton kernel, which is then still launched by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_sparse.errors import DeviceError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ShapeError
from compiled_sparse.ops.checks import check_dtype
from compiled_sparse.ops.checks import check_rank
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.routing import uses_gpu_kernels

_NAME = "top_k_blocks"
_CACHED_SCORES = 2**20

LIBRARY.define(
    f"{_NAME}(Tensor scores, SymInt max_k, Tensor? k) "
    "-> (Tensor block_indices, Tensor block_counts)"
)


def top_k_blocks(
    scores: Tensor, k: int | Tensor, *, max_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """List the k key blocks of the highest scores for every query block.

    Exactly k are listed in each row, or all where there are fewer. Of scores that tie for the last
    place those of the lowest key blocks are taken. Both zeros are equal; -inf can be listed, and
    NaN counts as lower than everything. Lists carry no gradient.

    As a tensor k may change from call to call without a recompilation, and no device is waited for.

    Args:
        scores: [batch, heads, query blocks, key blocks], any strides; float32, bfloat16, float16 or
            float64.
        k: How many, at least 1; an integer, or an integer tensor without axes on the device of
            `scores`, whose value is taken as 1 where it is less.
        max_k: Width of the lists where k is a tensor, an upper limit of its value.

    Returns:
        `block_indices` int32 [batch, heads, query blocks, K], ascending in each row, and
        `block_counts` int32 [batch, heads, query blocks]. K is the smaller of k, or `max_k`, and
        the number of key blocks; entries behind the count are 0.

    Raises:
        ShapeError: if `scores` has not four axes or no key blocks, k as an integer or `max_k` is
            less than 1, k as a tensor has axes, or not exactly one of the two gives the width.
        DtypeError: if a dtype is not supported.
        DeviceError: if k is a tensor on another device.
    """
    is_tensor = isinstance(k, Tensor)
    if is_tensor != (max_k is not None):
        raise ShapeError(
            "the width of the lists is not given exactly once",
            got=f"k {'as a tensor' if is_tensor else k}, max_k={max_k}",
            expected="an integer k alone, or k as a tensor with max_k",
            next_step="pass max_k=<the largest k there will be>"
            if is_tensor
            else "leave max_k out",
        )
    op = torch.ops.compiled_sparse.top_k_blocks
    width, limit = (max_k, k) if isinstance(k, Tensor) else (k, None)
    lists: tuple[Tensor, Tensor] = op(scores.detach(), width, limit)
    return lists


def _forward(scores: Tensor, max_k: int, k: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(scores, k)
    _check_sizes(scores, max_k)
    width = min(max_k, scores.shape[-1])
    scores = scores.contiguous()
    if uses_gpu_kernels(scores):
        from compiled_sparse.kernels import top_k

        new = scores.new_empty if k is None else scores.new_zeros
        indices = new((*scores.shape[:-1], width), dtype=torch.int32)
        counts = scores.new_empty(scores.shape[:-1], dtype=torch.int32)
        top_k.top_k_blocks(scores, k, indices, counts)
        return indices, counts
    return _cpu(scores, width, k)


def _check(scores: Tensor, k: Tensor | None) -> None:
    axes = "[batch, heads, query blocks, key blocks]"
    check_rank("scores", scores, axes=axes, after_heads="blocks")
    check_dtype("scores", scores)
    if k is None:
        return
    if k.dim() != 0:
        raise ShapeError(
            "k has axes",
            got=f"k of shape {tuple(k.shape)}",
            expected="a tensor without axes: one k for all rows",
            next_step="pass k.reshape(()), or call once for each k",
        )
    if k.dtype not in (torch.int32, torch.int64):
        raise DtypeError(
            "k is not an integer tensor",
            got=str(k.dtype),
            expected="torch.int32 or torch.int64",
            next_step="round it as you mean it, then convert it with .to(torch.int32)",
        )
    if k.device != scores.device:
        raise DeviceError(
            "k and scores are on different devices",
            got=f"k on {k.device}, scores on {scores.device}",
            expected="one device, as the host must not wait for k",
            next_step=f"move k to {scores.device}",
        )


def _check_sizes(scores: Tensor, max_k: int) -> None:
    if max_k < 1 or scores.shape[-1] < 1:
        raise ShapeError(
            "there is nothing to list",
            got=f"k or max_k {max_k}, scores of shape {tuple(scores.shape)}",
            expected="at least 1, and at least one key block",
            next_step="pass max(1, k)",
        )


def _cpu(scores: Tensor, width: int, k: Tensor | None) -> tuple[Tensor, Tensor]:
    count = width if k is None else max(1, min(int(k), width))
    rows = scores.flatten(0, 2)
    highest = _highest_by_rank if scores.element_size() == 2 else _highest_by_value
    lists = scores.new_zeros((*scores.shape[:-1], width), dtype=torch.int32)
    size = max(1, _CACHED_SCORES // scores.shape[-1])
    for some, target in zip(rows.split(size), lists.flatten(0, 2).split(size), strict=True):
        target[:, :count] = highest(some, count).to(torch.int32).sort(dim=-1).values
    return lists, torch.full(scores.shape[:-1], count, dtype=torch.int32)


def _highest_by_rank(rows: Tensor, count: int) -> Tensor:
    """Choose by integers in which score and column are one: scores of 16 bits often tie."""
    columns = rows.shape[-1]
    integer, shift = (torch.int32, 15) if columns <= 2**15 else (torch.int64, 32)
    ranks = _order_keys(rows).to(integer) << shift
    ranks |= torch.arange(columns - 1, -1, -1, dtype=integer)
    return ranks.topk(count, dim=-1, sorted=False).indices


def _highest_by_value(rows: Tensor, count: int) -> Tensor:
    """Choose by score, and once more, slowly, in rows where that is not clear."""
    values, indices = rows.topk(count, dim=-1, sorted=False)
    threshold = values.amin(-1, keepdim=True)
    # topk is exact unless scores tie for the last place, or are NaN, which it takes for highest.
    unclear = (rows >= threshold).sum(-1, dtype=torch.int32) != count
    if bool(unclear.any()):
        order = _order_keys(rows[unclear]).sort(dim=-1, descending=True, stable=True).indices
        indices[unclear] = order[:, :count]
    return indices


def _order_keys(scores: Tensor) -> Tensor:
    """Integers of the scores' size in their order; both zeros are one, and NaN is lowest."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()]
    limits = torch.iinfo(integer)
    bits = scores.view(integer)
    keys = torch.where(bits < 0, bits ^ limits.max, bits)
    keys = torch.where(scores == 0, 0, keys)
    return torch.where(scores.isnan(), limits.min, keys)


def _fake(scores: Tensor, max_k: Any, k: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(scores, k)
    width = torch.sym_min(max_k, scores.shape[-1])
    indices = scores.new_empty((*scores.shape[:-1], width), dtype=torch.int32)
    return indices, scores.new_empty(scores.shape[:-1], dtype=torch.int32)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl(_NAME, _forward, _device)
torch.library.register_fake(f"{NAMESPACE}::{_NAME}", _fake, lib=LIBRARY)
