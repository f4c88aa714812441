"""Tiles worth trying for a kernel, the most promising first; see `tuning` for what was chosen."""

from __future__ import annotations

from collections.abc import Iterator

from compiled_sparse.kernels.tuning import Tile

HEAD_DIMS = (64, 128, 256)
OWN_ROWS = (64, 128)
_WITH_PAIRS = ("forward", "backward_queries", "backward_keys")


def candidates(kernel: str, kind: str, head_dim: int, own: int) -> Iterator[Tile]:
    """Yield tiles for one entry of the table.

    Wide steps and deep pipelines come first; what a chip has no room for is left out by whoever
    compiles or runs them. Blocks joined in pairs come last: whether they pay only a device can say.

    Args:
        kernel: One of `tuning.KERNELS` or `tuning.CHUNK_KERNELS`.
        kind: One of `tuning.KINDS`.
        head_dim: Padded head size, one of `HEAD_DIMS`.
        own: Rows of the blocks that programs belong to, one of `OWN_ROWS`.
    """
    if kind != "half":
        # Without matrix instructions a product is unrolled and keeps whole rows in registers.
        sizes = ((64, 32), (32, 32), (32, 16), (16, 16)) if kind == "tf32" else ((16, 16),)
        yield from (
            Tile(*size, warps, stages) for size in sizes for stages in (2, 1) for warps in (4, 8)
        )
        return
    for rows in dict.fromkeys((own, 64, 32)):
        yield from _with_rows(kernel, head_dim, rows)
    if kernel in _WITH_PAIRS and head_dim <= 128 and own == 64:  # blocks of 64, like their own
        yield from (Tile(own, 128, warps, stages, True) for warps in (4, 8) for stages in (2, 1))


def _with_rows(kernel: str, head_dim: int, rows: int) -> Iterator[Tile]:
    few = 4 if rows * head_dim <= 64 * 128 else 8
    # The backward keeps two more tiles of scores in registers.
    depths = (3, 2, 1) if "forward" in kernel else (2, 1)
    for other in (64, 32, 16):
        for stages in depths:
            yield from (Tile(rows, other, warps, stages) for warps in dict.fromkeys((few, 8)))
