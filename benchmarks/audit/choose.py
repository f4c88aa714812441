"""Choose tiles for chips that are not here: the first candidates the audit has nothing against.

python -m benchmarks.audit.choose [--chips sm_90] [--table FILE]

A table made this way says so. `compiled-sparse bench --tune` replaces a chip's part by measured
tiles, and chips with measured tiles are left alone here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.audit.bounds import violations
from benchmarks.audit.cases import Case
from benchmarks.audit.cases import launches
from benchmarks.audit.chunk_cases import CHUNK
from benchmarks.audit.chunk_cases import SMALL_CHUNK
from benchmarks.audit.chunk_cases import ChunkCase
from benchmarks.audit.chunk_cases import chunk_launches
from benchmarks.audit.machine_code import usage
from benchmarks.audit.offline import compiling_for
from benchmarks.audit.switches import switches
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.candidates import HEAD_DIMS
from compiled_sparse.kernels.candidates import OWN_ROWS
from compiled_sparse.kernels.candidates import candidates
from compiled_sparse.kernels.tuning import Tile

SOURCE = "chosen offline: the first tile without spills that fits the chip; not measured"
KERNELS = [*tuning.KERNELS, *tuning.CHUNK_KERNELS]
_TILES = {64: ((4, 4, 4), (3, 5, 4)), 128: ((2, 8, 8), (5, 5, 5))}


def choose_tiles(
    chip: str, kernels: list[str], kinds: list[str]
) -> dict[str, dict[str, list[Any]]]:
    """Return the tiles of one chip, as they stand in the table, for some kinds of products."""
    tiles: dict[str, dict[str, list[Any]]] = {}
    for kernel in kernels:
        if kernel == "forward_boxes" and chip not in tuning.BULK_COPY_CHIPS:
            continue
        tiles[kernel] = {
            f"{kind}:{head_dim}:{own}": list(_first(chip, kernel, kind, head_dim, own))
            for kind in _kinds(chip, kernel)
            if kind in kinds
            for head_dim in HEAD_DIMS
            for own in OWN_ROWS
        }
    return tiles


def _kinds(chip: str, kernel: str) -> tuple[str, ...]:
    if kernel == "forward_boxes":
        return ("half",)
    return tuning.KINDS if chip.startswith("sm_") else ("half", "float32")  # no TF32 elsewhere


def _first(chip: str, kernel: str, kind: str, head_dim: int, own: int) -> Tile:
    for tile in candidates(kernel, kind, head_dim, own):
        cases = _hardest_cases(kernel, kind, head_dim, own)
        if not any(_violations(chip, kernel, case, tile) for case in cases):
            print(chip, kernel, f"{kind}:{head_dim}:{own}", *tile, flush=True)
            return tile
    raise RuntimeError(f"no tile for {kernel} {kind}:{head_dim}:{own} on {chip}")


def _hardest_cases(kernel: str, kind: str, head_dim: int, own: int) -> Iterator[Case | ChunkCase]:
    """The features that take most registers, together."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    precision = "tf32" if kind == "tf32" else "ieee"
    if kernel in tuning.CHUNK_KERNELS:
        many = own == max(OWN_ROWS)
        chunk = CHUNK if many else SMALL_CHUNK
        # Without a mask the compiler may order loads otherwise, and spill where it did not.
        for masked, groups in ((True, 2), (False, 1)):
            case = ChunkCase("", dtype, head_dim, chunk, precision=precision, long=many)
            yield replace(case, masked=masked, groups=groups)
        return
    boxes = kernel == "forward_boxes"
    hard = Case("", dtype, head_dim, text=77, masked=not boxes, groups=2, boxes=boxes)
    for tile in _TILES[own][:1] if boxes else _TILES[own]:
        yield replace(hard, tile=tile, precision=precision)


def _violations(chip: str, kernel: str, case: Case | ChunkCase, tile: Tile) -> list[str]:
    is_chunk = isinstance(case, ChunkCase)
    forward, backward = chunk_launches(case) if isinstance(case, ChunkCase) else launches(case)
    only = kernel.replace("chunk_", "chunk_attention_") if is_chunk else f"attention_{kernel}"
    with (
        compiling_for(chip, only) as compiled,
        switches(case.precision, case.boxes),
        tuning.demanding(kernel, tile),
    ):
        (forward if "forward" in kernel else backward)()
    (made,) = compiled
    if made.error is not None:
        return [made.error]
    has_matrix = case.dtype.itemsize == 2 or (case.dtype.itemsize == 4 and case.precision == "tf32")
    matrix = {"matrix": has_matrix, "wide_rows": tile.own >= 64}
    return list(violations(only, chip, usage(made.result), warps=tile.warps, **matrix))


def main() -> None:
    """Choose tiles and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit.choose", description=__doc__)
    parser.add_argument("--chips", nargs="*", choices=[*tuning.CHIPS, []], help="default: all")
    parser.add_argument("--kernels", nargs="*", choices=[*KERNELS, []], help="default: all")
    parser.add_argument("--kinds", nargs="*", choices=[*tuning.KINDS, []], help="default: all")
    parser.add_argument("--table", type=Path, default=tuning.SHIPPED)
    arguments = parser.parse_args()
    document = json.loads(arguments.table.read_text())
    for chip in arguments.chips or tuning.CHIPS:
        if document["chips"].get(chip, {}).get("source", SOURCE) == SOURCE:
            kept = document["chips"].get(chip, {}).get("tiles", {})
            kernels, kinds = arguments.kernels or KERNELS, arguments.kinds or list(tuning.KINDS)
            chosen = choose_tiles(chip, kernels, kinds)
            tiles = kept | {kernel: kept.get(kernel, {}) | chosen[kernel] for kernel in chosen}
            record = {"source": SOURCE, "triton": triton.__version__, "tiles": tiles}
            document["chips"][chip] = record
    tuning.write_table(document, arguments.table)


if __name__ == "__main__":
    main()
