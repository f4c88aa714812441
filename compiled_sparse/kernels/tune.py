"""Measure the candidate tiles of every kernel on the device at hand and keep the fastest.

Runs only when asked for (`compiled-sparse bench --tune`); what it finds is a part of the table
that `tuning` reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_sparse.kernels import attention
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.attention import Call
from compiled_sparse.kernels.attention import Geometry
from compiled_sparse.kernels.box_launch import takes_boxes
from compiled_sparse.kernels.candidates import HEAD_DIMS
from compiled_sparse.kernels.candidates import OWN_ROWS
from compiled_sparse.kernels.candidates import candidates
from compiled_sparse.kernels.tuning import Tile

Measure = Callable[[Callable[[], None]], float]
"""Runs a call as often as it likes; returns seconds, or infinity where it cannot run."""

_GRID = (16, 32, 32)
_HEADS = 16
_DENSITY = 0.1
_TILES = {64: (4, 4, 4), 128: (2, 8, 8)}


class Finding(NamedTuple):
    """The fastest tile of one entry of the table, and its time in seconds."""

    kernel: str
    key: str
    tile: Tile
    seconds: float


def tune(chip: str, device: torch.device, measure: Measure) -> Iterator[Finding]:
    """Yield the fastest tile for each entry of two-byte elements, one after another.

    Args:
        chip: The row of the table.
        device: Where to measure.
        measure: How to measure.
    """
    for head_dim in HEAD_DIMS:
        for own in OWN_ROWS:
            problem = _Problem(head_dim, own, device)
            for kernel in tuning.KERNELS:
                if kernel == "forward_boxes" and not takes_boxes(problem.call, chip):
                    continue
                finding = _fastest(kernel, problem, measure)
                if finding.seconds < math.inf:  # else no candidate ran, and the old entry stays
                    yield finding


def updated(record: dict[str, Any], findings: list[Finding]) -> dict[str, Any]:
    """Return a chip's part of the table with what was found; other entries stay as they were.

    Boxes become the default where they were faster than rows in more than half of the cases.
    """
    tiles = {kernel: dict(entries) for kernel, entries in record["tiles"].items()}
    seconds: dict[str, dict[str, float]] = {kernel: {} for kernel in tuning.KERNELS}
    for finding in findings:
        tiles.setdefault(finding.kernel, {})[finding.key] = list(finding.tile)
        seconds[finding.kernel][finding.key] = finding.seconds
    rows, boxes = seconds["forward"], seconds["forward_boxes"]
    faster = [boxes[key] < rows[key] for key in boxes.keys() & rows.keys()]
    return record | {"tiles": tiles, "boxes": sum(faster) * 2 > len(faster)}


class _Problem:
    """One call on random lists, large enough to fill a device."""

    def __init__(self, head_dim: int, own: int, device: torch.device) -> None:
        self.head_dim, self.own = head_dim, own
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, math.prod(_GRID), _HEADS, head_dim)

        def random() -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(torch.bfloat16).transpose(1, 2)

        tile = _TILES[own]
        blocks = math.prod(_GRID) // own
        scores = torch.rand(1, _HEADS, blocks, blocks, generator=generator, device=device)
        listed = math.ceil(_DENSITY * blocks)
        indices = scores.topk(listed).indices.sort().values.int()
        counts = torch.full(indices.shape[:-1], listed, dtype=torch.int32, device=device)
        geometry = Geometry(_GRID, _GRID, tile, tile, 0, 0, blocks, blocks)
        q, k, v = random(), random(), random()
        self.call = Call(q, k, v, indices, counts, None, geometry, head_dim**-0.5)
        self._grad_out, self._out = random(), torch.empty_like(q)
        self._lse = torch.empty(q.shape[:-1], device=device)
        self._gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        attention.forward_rows(self.call, self._out, self._lse)
        self._delta = torch.zeros_like(self._lse)

    def run(self, kernel: str) -> None:
        call, lse, delta = self.call, self._lse, self._delta
        grad_q, grad_k, grad_v = self._gradients
        if kernel == "forward":
            attention.forward_rows(call, self._out, lse)
        elif kernel == "forward_boxes":
            attention.forward_boxes(call, self._out, lse)
        elif kernel == "backward_queries":
            attention.query_gradient(call, self._grad_out, lse, delta, grad_q)
        else:
            attention.key_gradients(call, self._grad_out, lse, delta, grad_k, grad_v)


def _fastest(kernel: str, problem: _Problem, measure: Measure) -> Finding:
    key = f"half:{problem.head_dim}:{problem.own}"
    best = Finding(kernel, key, Tile(0, 0, 0, 0), math.inf)
    for tile in candidates(kernel, "half", problem.head_dim, problem.own):
        with tuning.demanding(kernel, tile):
            seconds = measure(lambda: problem.run(kernel))
        if seconds < best.seconds:
            best = Finding(kernel, key, tile, seconds)
    return best
