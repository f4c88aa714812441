"""The k highest of a row of scores, ascending by place, without a host synchronisation.

Scores are read as the integers of their bits, mapped so that integers order like the numbers. The
k-th highest is found bit by bit: the largest integer that at least k of the row reach.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled_sparse.kernels import launch

_MAX_SIZE = 8192
_KEY_BYTES_PER_WARP = 4096
_STEP_PER_WARP = 256
_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def load_keys(
    row,
    start,
    columns,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Load `SIZE` scores of a row as integers in their order.

    Both zeros are 0, NaN is lower than every number, and what lies behind the row lower still.
    """
    LARGEST: tl.constexpr = 2 ** (BITS - 1) - 1
    SMALLEST: tl.constexpr = -LARGEST - 1
    column = start + tl.arange(0, SIZE)
    bits = tl.load(row + column, mask=column < columns, other=0).to(KEY)
    magnitude = bits & LARGEST
    key = tl.where(bits < 0, bits ^ LARGEST, bits)
    key = tl.where(magnitude == 0, 0, key)
    key = tl.where(magnitude > INFINITY, SMALLEST + 1, key)
    return tl.where(column < columns, key, SMALLEST)


@triton.jit
def count_reaching(
    key,
    row,
    columns,
    keys,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    SIZE: tl.constexpr,
    HELD: tl.constexpr,
):
    """Return how many scores of a row are at least `key`; `keys` are all of them, if held."""
    if HELD:
        return tl.sum((keys >= key).to(tl.int32), 0)
    count = 0
    for start in range(0, columns, SIZE):
        more = load_keys(row, start, columns, KEY, BITS, INFINITY, SIZE)
        count += tl.sum((more >= key).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["columns", "width"])
def list_top_k(
    scores,
    limit,
    indices,
    counts,
    columns,
    width,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    SIZE: tl.constexpr,
    HELD: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write which k of the `columns` scores of a row are highest, and k.

    k is `width`, or the integer at `limit` brought into 1 to `width`. `SIZE` scores are taken at a
    time; where that is a whole row, it is `HELD` while the k-th highest is searched. What is found
    is written `STEP` columns at a time, which takes fewer registers.
    """
    SMALLEST: tl.constexpr = -(2 ** (BITS - 1))
    program = tl.program_id(0).to(tl.int64)
    row = scores + program * columns
    k = width
    if limit is not None:
        k = tl.minimum(tl.maximum(tl.load(limit), 1), width).to(tl.int32)
    keys = load_keys(row, 0, columns, KEY, BITS, INFINITY, SIZE)
    zero = tl.zeros([], KEY)
    reached = count_reaching(zero, row, columns, keys, KEY, BITS, INFINITY, SIZE, HELD) >= k
    threshold = tl.where(reached, zero, zero + SMALLEST)
    bit = tl.full([], 2 ** (BITS - 2), KEY)
    for _ in range(BITS - 1):
        higher = threshold + bit
        count = count_reaching(higher, row, columns, keys, KEY, BITS, INFINITY, SIZE, HELD)
        threshold = tl.where(count >= k, higher, threshold)
        bit = bit >> 1
    above = threshold + 1
    ties = k - count_reaching(above, row, columns, keys, KEY, BITS, INFINITY, SIZE, HELD)
    place = 0
    for start in range(0, columns, STEP):
        some = load_keys(row, start, columns, KEY, BITS, INFINITY, STEP)
        more = (some > threshold).to(tl.int32)
        equal = (some == threshold).to(tl.int32)
        # One scan counts both: neither exceeds 16 bits.
        both = more + equal * 65536
        before = tl.cumsum(both, 0) - both
        ties_before = tl.minimum(before >> 16, ties)
        chosen = (more > 0) | ((equal > 0) & ((before >> 16) < ties))
        target = indices + program * width + place + (before & 65535) + ties_before
        tl.store(target, start + tl.arange(0, STEP), mask=chosen)
        place += tl.sum(chosen.to(tl.int32), 0)
        ties -= tl.minimum(tl.sum(equal, 0), ties)
    tl.store(counts + program, k)


def top_k_blocks(scores: Tensor, limit: Tensor | None, indices: Tensor, counts: Tensor) -> None:
    """Write the columns of the k highest scores of every row, ascending, and k.

    Args:
        scores: [..., columns], contiguous; float32, float64, bfloat16 or float16.
        limit: int32 or int64 without axes, or None for the width of `indices`.
        indices: int32 [..., width], contiguous; entries behind k are left as they are.
        counts: int32 [...], contiguous.
    """
    columns, width = scores.shape[-1], indices.shape[-1]
    size = min(_MAX_SIZE, max(16, triton.next_power_of_2(columns)))
    item = scores.element_size()
    warps = max(1, size * max(4, item) // _KEY_BYTES_PER_WARP)
    constants = {
        "KEY": tl.int64 if item == 8 else tl.int32,
        "BITS": 8 * item,
        "INFINITY": _INFINITY[scores.dtype],
        "SIZE": size,
        "HELD": columns <= size,
        "STEP": min(size, _STEP_PER_WARP * warps),
    }
    launch.run(
        list_top_k,
        counts.numel(),
        (scores.view(_BITS[item]), limit, indices, counts, columns, width),
        constants,
        warps=warps,
    )
