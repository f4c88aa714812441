"""Tiles worth trying for a kernel, the most promising first; see `tuning` for what was chosen."""

from __future__ import annotations

from collections.abc import Iterator

from compiled_sparse.kernels.tuning import Tile

HEAD_DIMS = (64, 128, 256)
ITEM_BYTES = (2, 4, 8)
OWN_ROWS = (64, 128)


def candidates(kernel: str, item_bytes: int, head_dim: int, own: int) -> Iterator[Tile]:
    """Yield tiles for one entry of the table.

    Wide steps and deep pipelines come first; what a chip has no room for is left out by whoever
    compiles or runs them. Blocks joined in pairs come last: whether they pay only a device can say.

    Args:
        kernel: One of `tuning.KERNELS`.
        item_bytes: Bytes per element of q, k and v.
        head_dim: Padded head size, one of `HEAD_DIMS`.
        own: Rows of the blocks that programs belong to, one of `OWN_ROWS`.
    """
    if item_bytes == 8:
        yield from (Tile(rows, 16, 4, 1) for rows in (32, 16))
        return
    most = own if item_bytes == 2 else min(own, 64)
    for rows in dict.fromkeys((most, 64, 32)):
        yield from _with_rows(kernel, item_bytes, head_dim, rows)
    if item_bytes == 2 and head_dim <= 128:
        yield from (Tile(own, 128, warps, stages, True) for warps in (4, 8) for stages in (2, 1))


def _with_rows(kernel: str, item_bytes: int, head_dim: int, rows: int) -> Iterator[Tile]:
    few = 4 if rows * head_dim <= 64 * 128 else 8
    # The backward keeps two more tiles of scores in registers.
    crowded = kernel != "forward" or item_bytes == 4
    for other in (64, 32, 16):
        for stages in (2, 1) if crowded else (3, 2, 1):
            yield from (Tile(rows, other, warps, stages) for warps in dict.fromkeys((few, 8)))
