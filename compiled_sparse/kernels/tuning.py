"""Sizes of the kernels' tiles: a table that ships with the package, read once.

Nothing is tuned at run time. `compiled-sparse bench --tune` measures on the device at hand and
writes a table of the same form; COMPILED_SPARSE_TUNING names a table to use instead of the shipped.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from typing import Final
from typing import NamedTuple

import triton

TABLE_VARIABLE: Final = "COMPILED_SPARSE_TUNING"
SHIPPED: Final = Path(__file__).with_name("tuning.json")
KERNELS: Final = ("forward", "forward_boxes", "backward_queries", "backward_keys")
CHUNK_KERNELS: Final = ("chunk_forward", "chunk_backward_queries", "chunk_backward_keys")
"""Those of attention over chunks; their own rows are those that meet, see `chunk_attention`."""

KINDS: Final = ("half", "float32", "tf32")
"""How products are made: of two-byte elements, of float32, of float32 rounded on the way."""

CHIPS: Final = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
BULK_COPY_CHIPS: Final = ("sm_90", "sm_100", "sm_120")
BOXES_VARIABLE: Final = "COMPILED_SPARSE_GPU_BOXES"

_WASTE: Final = {128: 1.0, 64: 1.0, 32: 1.5, 16: 2.5}
"""What a slot costs in a matrix product of so many rows, beside one of 128."""


class Tile(NamedTuple):
    """How one program of a kernel is cut.

    Args:
        own: Rows of the block that the program belongs to.
        other: Rows it takes from its list at a step.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        joined: Whether a step takes two whole blocks of its list, `other // 2` rows each.
    """

    own: int
    other: int
    warps: int
    stages: int
    joined: bool = False


def chunk_rows(block_size: int, most: int) -> int:
    """Return in how many rows at a time a block of `block_size` slots is best taken."""

    def cost(rows: int) -> tuple[float, int]:
        return -(-block_size // rows) * rows * _WASTE[rows], -rows

    return min((rows for rows in _WASTE if rows <= most), key=cost)


def chip_of(backend: str, arch: Any) -> str:
    """Return the row of the table for a Triton target: the nearest chip that is not newer."""
    if backend == "hip":
        return "gfx942"
    known = [chip for chip in CHIPS if chip.startswith("sm_") and int(chip[3:]) <= int(arch)]
    return known[-1] if known else CHIPS[0]


def current_chip() -> str:
    """Return the row of the table for the device that kernels run on now."""
    if triton.knobs.runtime.interpret:
        return BULK_COPY_CHIPS[0]  # the interpreter knows everything that any chip does
    target = triton.runtime.driver.active.get_current_target()
    return chip_of(target.backend, target.arch)


def wants_boxes(chip: str) -> bool:
    """Return whether the forward should fetch boxes where it can.

    COMPILED_SPARSE_GPU_BOXES says so (1) or not (0). Unset, it does on chips whose part of the
    table was measured and found it faster.
    """
    wish = os.environ.get(BOXES_VARIABLE)
    return wish == "1" if wish else chip in _chips_with_boxes()


def choose(
    kernel: str, chip: str, kind: str, head_dim: int, own_size: int, other_size: int
) -> Tile:
    """Return the tile of a kernel for blocks of given sizes.

    Args:
        kernel: One of `KERNELS` or `CHUNK_KERNELS`.
        chip: One of `CHIPS`.
        kind: One of `KINDS`.
        head_dim: Head size.
        own_size: Slots of the blocks that programs belong to.
        other_size: Slots of the blocks in their lists.
    """
    if kernel in _demanded:
        return _demanded[kernel]
    width = max(64, triton.next_power_of_2(head_dim))
    entries = table()[chip][kernel]
    large = entries[f"{kind}:{width}:128"]
    small = entries[f"{kind}:{width}:64"]
    own = chunk_rows(own_size, large.own)
    entry = large if own > small.own else small
    own = min(own, entry.own)
    if entry.joined and chunk_rows(other_size, entry.other // 2) >= other_size:
        return entry._replace(own=own)
    return entry._replace(own=own, other=chunk_rows(other_size, entry.other), joined=False)


@contextmanager
def demanding(kernel: str, tile: Tile) -> Iterator[None]:
    """Let a kernel use one tile inside the block, whatever the table says; for all threads."""
    _demanded[kernel] = tile
    try:
        yield
    finally:
        del _demanded[kernel]


_demanded: dict[str, Tile] = {}


def describe(chip: str) -> dict[str, str]:
    """Say which table is in use, what it says of a chip, and where that is from."""
    record = _document()["chips"][chip]
    return {
        "table": str(_path()),
        "chip": chip,
        "source": str(record["source"]),
        "boxes": "yes" if wants_boxes(chip) else "no",
    }


@functools.cache
def _chips_with_boxes() -> frozenset[str]:
    return frozenset(chip for chip, record in _document()["chips"].items() if record.get("boxes"))


@functools.cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_path().read_text())
    return document


def _path() -> Path:
    return Path(os.environ.get(TABLE_VARIABLE) or SHIPPED)


@functools.cache
def table() -> dict[str, dict[str, dict[str, Tile]]]:
    """Return the tiles by chip, kernel and `kind:head size:rows of the block`."""
    return {
        chip: {
            kernel: {key: Tile(*values) for key, values in tiles.items()}
            for kernel, tiles in record["tiles"].items()
        }
        for chip, record in _document()["chips"].items()
    }


def write_table(document: dict[str, Any], path: Path) -> None:
    """Write a table with one tile per line, so that a difference between two is readable."""
    lines = json.dumps(document, indent=1).splitlines()
    text = "\n".join(lines)
    flat = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda found: f"[{_one_line(found[1])}]", text)
    path.write_text(flat + "\n")


def _one_line(items: str) -> str:
    return " ".join(items.split())
