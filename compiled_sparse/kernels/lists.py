"""Block lists rearranged on the device, without a host synchronisation and without atomics.

Lists are int32 [lists, rows, width] with counts [lists, rows]; `lists` runs over the batch entries
and heads that have lists of their own. Work and memory grow with `lists * rows * blocks` bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled_sparse.kernels import launch

_CLASSES = 8


@triton.jit(do_not_specialize=["rows", "width", "blocks", "capacity"])
def mark_listed(indices, counts, marks, rows, width, blocks, SIZE: tl.constexpr):
    """Set `marks` uint8 [lists, blocks, rows], zero before, to 1 where a row lists a block."""
    program = tl.program_id(0).to(tl.int64)
    row = program % rows
    count = tl.load(counts + program)
    column = marks + program // rows * blocks * rows + row
    for start in range(0, width, SIZE):
        place = start + tl.arange(0, SIZE)
        listed = place < count
        block = tl.load(indices + program * width + place, mask=listed, other=0)
        inside = listed & (block >= 0) & (block < blocks)
        one = tl.full([SIZE], 1, tl.uint8)
        tl.store(column + block.to(tl.int64) * rows, one, mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "blocks", "capacity"])
def collect_marked(marks, starts, entries, rows, blocks, capacity, SIZE: tl.constexpr):
    """Write the rows marked for each block, ascending, into `entries` [lists, capacity].

    Those of block b begin at `starts` [lists, blocks + 1] of b.
    """
    program = tl.program_id(0).to(tl.int64)
    block_list = program // blocks
    place = tl.load(starts + block_list * (blocks + 1) + program % blocks)
    target = entries + block_list * capacity
    for start in range(0, rows, SIZE):
        row = start + tl.arange(0, SIZE)
        mark = tl.load(marks + program * rows + row, mask=row < rows, other=0).to(tl.int32)
        tl.store(target + place + tl.cumsum(mark, 0) - 1, row, mask=mark > 0)
        place += tl.sum(mark, 0)


@triton.jit(do_not_specialize=["rows", "width", "blocks", "capacity"])
def order_by_count(counts, order, rows, width, CLASSES: tl.constexpr, SIZE: tl.constexpr):
    """Write the rows of each list into `order` [lists, rows], those with most entries first.

    Counts are told apart in `CLASSES` steps only; within one, neighbouring rows stay neighbours.
    """
    counts += tl.program_id(0).to(tl.int64) * rows
    order += tl.program_id(0).to(tl.int64) * rows
    place = 0
    for wanted in range(CLASSES):
        for start in range(0, rows, SIZE):
            row = start + tl.arange(0, SIZE)
            count = tl.load(counts + row, mask=row < rows, other=0).to(tl.int64)
            found = CLASSES - 1 - (count * CLASSES - 1) // tl.maximum(width, 1)
            found = tl.minimum(tl.maximum(found, 0), CLASSES - 1)
            mine = ((found == wanted) & (row < rows)).to(tl.int32)
            tl.store(order + place + tl.cumsum(mine, 0) - 1, row, mask=mine > 0)
            place += tl.sum(mine, 0)


class TransposedLists(NamedTuple):
    """Which query blocks list each key block.

    Args:
        entries: int32 [batch or 1, heads or 1, capacity], query blocks, ascending for each key
            block; what lies behind the last start is undefined.
        starts: int32 [batch or 1, heads or 1, key blocks + 1], where those of a key block begin.
    """

    entries: Tensor
    starts: Tensor


def transpose_lists(indices: Tensor, counts: Tensor, blocks: int) -> TransposedLists:
    """Turn lists of key blocks into lists of query blocks.

    Args:
        indices: int32 [batch or 1, heads or 1, rows, width], contiguous.
        counts: int32 [batch or 1, heads or 1, rows], contiguous.
        blocks: Number of key blocks.
    """
    *lists, rows, width = indices.shape
    number = math.prod(lists)
    marks = torch.zeros((*lists, blocks, rows), dtype=torch.uint8, device=indices.device)
    size = _span(width)
    launch.run(
        mark_listed, number * rows, (indices, counts, marks, rows, width, blocks), {"SIZE": size}
    )
    starts = counts.new_zeros((*lists, blocks + 1))
    torch.cumsum(marks.sum(-1, dtype=torch.int32), -1, dtype=torch.int32, out=starts[..., 1:])
    entries = counts.new_empty((*lists, rows * width))
    arguments = (marks, starts, entries, rows, blocks, rows * width)
    launch.run(collect_marked, number * blocks, arguments, {"SIZE": _span(rows)})
    return TransposedLists(entries, starts)


def heavy_first(counts: Tensor, most: int) -> Tensor:
    """Return the rows of each list in the order they are best started in, longest lists first.

    Lengths are told apart in eighths of `most`; rows of a class keep their order, so that
    neighbours still run together.

    Args:
        counts: int32 [batch or 1, heads or 1, rows], contiguous.
        most: The largest count possible.

    Returns:
        int32, shaped like `counts`.
    """
    rows = counts.shape[-1]
    order = torch.empty_like(counts)
    constants = {"CLASSES": _CLASSES, "SIZE": _span(rows)}
    launch.run(order_by_count, math.prod(counts.shape[:-1]), (counts, order, rows, most), constants)
    return order


def _span(length: int) -> int:
    """How many entries one program takes at a time."""
    return min(1024, max(16, int(triton.next_power_of_2(length))))
