"""Problems of selecting chunks for each query, and the rules, followed query by query."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

import oracle
import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A problem; `values` says which numbers queries and means are made of."""

    grid: tuple[int, ...] = (5, 7, 3)
    tile: tuple[int, ...] = (2, 3, 3)
    text: tuple[int, int] = (0, 0)
    batch: int = 1
    heads: tuple[int, int] = (2, 2)
    dim: int = 16
    dtype: torch.dtype = torch.float32
    values: str = "random"
    magnitude: float = 1.0  # of the means
    masked: bool = False
    mode: str = "topk"
    count: int = 2
    threshold: float = 0.25

    @property
    def videos(self) -> int:
        return math.prod(self.grid)

    @property
    def runs(self) -> tuple[int, int]:
        size = math.prod(self.tile)
        return -(-self.text[0] // size), -(-self.text[1] // size)


@dataclass(frozen=True)
class Inputs:
    case: Case
    q: Tensor
    means: Tensor
    own: Tensor
    chunk_visible: Tensor | None
    query_visible: Tensor | None

    def call(self, select_per_query: Callable[..., Tensor]) -> Tensor:
        """What a function like `ops.cpu.select_per_query` returns."""
        case = self.case
        return select_per_query(
            *(self.q, self.means, self.own, self.chunk_visible, self.query_visible),
            text_before=case.text[0],
            text_after=case.text[1],
            runs_before=case.runs[0],
            runs_after=case.runs[1],
            mode=case.mode,
            count=case.count,
            threshold=case.threshold,
        )


def numbers(values: str, *shape: int) -> Tensor:
    if values == "random":
        return torch.randn(shape)
    if values == "equal":
        return torch.ones(shape)
    most = {"quarters": 8, "tied": 1}[values]
    return torch.randint(-most, most + 1, shape) / 4


def make(case: Case, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    chunks = oracle.blocks(case.grid, case.tile)
    own = torch.empty(case.videos, dtype=torch.int32)
    for i, chunk in enumerate(chunks):
        own[chunk] = i
    length = case.videos + sum(case.text)
    q = numbers(case.values, case.batch, case.heads[0], length, case.dim).to(case.dtype)
    means = numbers(case.values, case.batch, case.heads[1], len(chunks), case.dim)
    means *= case.magnitude
    chunk_visible = torch.rand(case.batch, len(chunks)) > 0.3 if case.masked else None
    query_visible = torch.rand(case.batch, case.videos) > 0.3 if case.masked else None
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Inputs(case, q, means.to(compute), own, chunk_visible, query_visible)


def expected(x: Inputs) -> Tensor:
    """What the rules say, one query after the other."""
    case, (before, after) = x.case, x.case.text
    count = x.means.shape[2]
    selected = torch.zeros(*x.q.shape[:2], sum(case.runs) + count, x.q.shape[2], dtype=torch.bool)
    selected[:, :, : case.runs[0]] = True
    selected[:, :, case.runs[0] + count :] = True
    selected[..., :before] = True
    selected[..., x.q.shape[2] - after :] = True
    group = x.q.shape[1] // x.means.shape[1]
    for b in range(x.q.shape[0]):
        visible = [x.chunk_visible is None or bool(x.chunk_visible[b, c]) for c in range(count)]
        for h in range(x.q.shape[1]):
            gates = x.q[b, h].to(x.means.dtype) @ x.means[b, h // group].mT
            for video in range(case.videos):
                own = int(x.own[video])
                chosen = [own]
                if x.query_visible is None or x.query_visible[b, video]:
                    chosen += others(case, gates[before + video], own, visible)
                for c in chosen:
                    selected[b, h, case.runs[0] + c, before + video] = True
    return selected


def others(case: Case, gate: Tensor, own: int, visible: list[bool]) -> list[int]:
    seen = [c for c in range(len(visible)) if visible[c]]
    candidates = [c for c in seen if c != own]
    if not candidates:
        return []
    if case.mode == "topk":
        return ranked(gate, candidates)[: max(case.count, 0)]
    low, high = gate[seen].min(), gate[seen].max()
    width = high - low
    if width <= 1e-6:
        width = torch.ones_like(width)
    gate = (gate - low) / width
    total = sum(gate[c].item() for c in seen)
    share = gate[own].item() if visible[own] else 0.0
    need = max(0.0, case.threshold - share / (total + 1e-6))
    running, chosen = 0.0, []
    for c in ranked(gate, candidates):
        chosen.append(c)
        running += gate[c].item()
        if running / (total + 1e-6) >= need:
            break
    return chosen


def ranked(gate: Tensor, candidates: list[int]) -> list[int]:
    return sorted(candidates, key=lambda c: (-gate[c].item(), c))


BASE = Case()
QUARTERS = replace(BASE, values="quarters", text=(5, 40), batch=2, heads=(4, 2), masked=True)
SIZES = {
    "base": BASE,
    "text": replace(BASE, text=(5, 40)),
    "float64": replace(BASE, dtype=torch.float64, dim=24),
    "bfloat16": replace(BASE, dtype=torch.bfloat16, values="quarters", dim=80),
    "float16": replace(BASE, dtype=torch.float16, values="quarters"),
    "mask": replace(BASE, batch=2, masked=True),
    "grouped heads": QUARTERS,
    "ties": replace(BASE, values="tied", dim=2),
    "ties in float64": replace(BASE, values="tied", dim=2, dtype=torch.float64),
    "equal gates": replace(BASE, values="equal"),
    "gates about a millionth apart": replace(BASE, values="quarters", magnitude=2.0**-24),
    "one chunk": replace(BASE, tile=(5, 7, 3), text=(3, 0)),
    "two chunks": replace(BASE, tile=(3, 7, 3)),
    "many chunks": replace(BASE, tile=(1, 1, 1), values="quarters"),
    "one token": replace(BASE, grid=(1,), tile=(1,)),
    "whole words": replace(BASE, grid=(4, 8, 4), tile=(4, 4, 2)),
}
