"""What becomes of one model: the evidence behind a row of docs/models.md."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import harness
import torch
from builders.base import Builder
from builders.base import Truth

import compiled_sparse as cs
from compiled_sparse.report import Decision

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Measured:
    """One model, compiled in one way.

    Args:
        way: What was passed beside the model's own inputs, as code; empty for nothing.
        calls: Attention calls of one forward.
        sparse: How many of them ran sparse.
        missed: How many are full attention over the grid but ran dense.
        reasons: Reason code of each other call, with its count.
        details: Reason code and detail of the missed ones.
        graphs: Number of graphs.
        exact_error: A window over the whole grid against dense attention, relative.
        narrow_error: The narrowest window against the eager reference, relative.
        wrong: One line per layout that is not the true one.
    """

    way: str
    calls: int
    sparse: int
    missed: int
    reasons: dict[str, int]
    details: tuple[str, ...]
    graphs: int
    exact_error: float
    narrow_error: float
    wrong: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong; a call that stayed dense is not wrong."""
        return not self.wrong and max(self.exact_error, self.narrow_error) < TOLERANCE


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        name: The builder's.
        family: The builder's.
        model: Name of the class.
        grid: The grid used.
        dense_graphs: Number of graphs under plain torch.compile.
        ways: The model as it is, and a second way where that makes more calls sparse.
    """

    name: str
    family: str
    model: str
    grid: tuple[int, ...]
    dense_graphs: int
    ways: tuple[Measured, ...]

    @property
    def is_right(self) -> bool:
        """Whether every way is right and adds no graph break."""
        return all(way.is_right and way.graphs <= self.dense_graphs for way in self.ways)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "is_right": self.is_right}


def measure(builder: Builder) -> Row:
    """Compile a model as it is and, where calls are missed, with metadata; compare the outputs."""
    with torch.no_grad():
        case = harness.build(builder)
        dense = harness.outputs(case)
        plain = harness.compile_and_run(case, None)
        ways = [measure_way(builder, dense)]
        for name, context in _further_ways(builder):
            if ways[0].missed == 0:
                break
            way = measure_way(builder, dense, name, context)
            if way.missed < min(known.missed for known in ways) or not way.is_right:
                ways.append(way)
    best = ways[-1:] if len(ways) > 1 else []
    return Row(
        builder.name,
        builder.family,
        builder.model,
        builder.grid,
        plain.graphs,
        (ways[0], *(way for way in ways[1:-1] if not way.is_right), *best),
    )


def measure_way(
    builder: Builder,
    dense: torch.Tensor,
    way: str = "",
    context: AbstractContextManager[Any] | None = None,
) -> Measured:
    """Compile with a spanning and with the narrowest window inside a context and compare."""
    case, axes = harness.build(builder), len(builder.grid)
    truths = harness.truths(builder)
    with context or nullcontext():
        spanning = harness.compile_and_run(case, harness.spanning(axes))
        narrow = harness.compile_and_run(case, harness.narrow(axes))
    sites, wrong = harness.sites_of_calls(narrow, truths, builder.grid)
    expected = harness.replay(case, sites, harness.narrow(axes)) if sites else dense
    missed = [
        index
        for index, truth in enumerate(truths)
        if truth.kind == "video" and sites and sites[index] is None
    ]
    return Measured(
        way=way,
        calls=len(truths),
        sparse=sum(narrow.executed),
        missed=len(missed),
        reasons=_reasons(narrow),
        details=_details(narrow, missed),
        graphs=narrow.graphs,
        exact_error=harness.relative_error(spanning.output, dense),
        narrow_error=harness.relative_error(narrow.output, expected),
        wrong=tuple(wrong),
    )


def _reasons(run: harness.Compiled) -> dict[str, int]:
    reasons = Counter(site.reason for site in run.sites if site.reason)
    missing = len(run.executed) - len(harness.sdpa_sites(run.sites))
    if missing > 0:
        reasons["not in a graph of its own"] = missing
    return dict(reasons)


def _details(run: harness.Compiled, missed: Sequence[int]) -> tuple[str, ...]:
    sites = harness.sdpa_sites(run.sites)
    chosen: Sequence[Decision] = (
        [sites[index] for index in missed] if len(sites) == len(run.executed) else sites
    )
    seen = [f"{site.reason}: {site.detail}" for site in chosen if site.reason]
    return tuple(dict.fromkeys(seen))


def _further_ways(builder: Builder) -> list[tuple[str, AbstractContextManager[Any]]]:
    grid, seen = builder.grid, dict.fromkeys(harness.truths(builder))
    ways: list[tuple[str, AbstractContextManager[Any]]] = [
        (f"cs.metadata(grid_thw={grid})", cs.metadata(grid_thw=grid))
    ]
    joint = [truth for truth in seen if truth.kind == "video" and truth.before + truth.after]
    return ways + [_with_text(grid, truth) for truth in joint]


def _with_text(grid: tuple[int, ...], truth: Truth) -> tuple[str, AbstractContextManager[Any]]:
    sides = {"before": truth.before, "after": truth.after}
    text = ", ".join(f"{side}={length}" for side, length in sides.items() if length)
    return (
        f"cs.metadata(grid_thw={grid}, text=cs.Text({text}))",
        cs.metadata(grid_thw=grid, text=cs.Text(**sides)),
    )
