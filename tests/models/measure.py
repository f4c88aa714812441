"""What becomes of one model: the evidence behind a row of docs/models.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import ExitStack
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
import torch
from builders.base import Builder
from builders.base import Grid
from builders.base import Truth

import compiled_sparse as cs
from compiled_sparse.report import Decision

UNSEEN = "In code that Dynamo leaves to Python after a graph break, or in a graph shared by layers."
_EXPECTED = ("not_video", "cross_attention")


@dataclass(frozen=True)
class Measured:
    """One model, compiled in one way.

    Args:
        way: What was passed beside the model's own inputs, as code; empty for nothing.
        calls: Attention calls of one forward.
        sparse: How many of them ran sparse.
        missed: How many are full attention over the grid but ran dense.
        outcomes: For each call in a graph, "sparse" or the reason code, as it was compiled.
        details: Reason code and detail of the missed ones.
        graphs: Number of graphs.
        exact_error: A window over the whole grid against dense attention, relative.
        narrow_error: The narrowest window against the eager reference, relative.
        tolerance: What rounding explains of these errors.
        wrong: One line per layout that is not the true one.
    """

    way: str
    calls: int
    sparse: int
    missed: int
    outcomes: tuple[str, ...]
    details: tuple[str, ...]
    graphs: int
    dense_graphs: int
    exact_error: float
    narrow_error: float
    tolerance: float
    wrong: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong; a call that stayed dense is not wrong."""
        return not self.wrong and max(self.exact_error, self.narrow_error) < self.tolerance


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        name: The builder's.
        family: The builder's.
        model: Name of the class.
        grid: The grid used.
        ways: The model as it is, and a second way where that makes more calls sparse.
    """

    name: str
    family: str
    model: str
    grid: tuple[int, ...]
    ways: tuple[Measured, ...]

    @property
    def is_right(self) -> bool:
        """Whether every way is right and adds no graph break."""
        return all(way.is_right and way.graphs <= way.dense_graphs for way in self.ways)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "is_right": self.is_right}


def measure(builder: Builder) -> Row:
    """Compile a model as it is and, where calls are missed, with more; compare the outputs.

    Of the further ways the row holds the first that leaves the fewest calls dense, and every one
    that is wrong.
    """
    with torch.no_grad():
        dense = harness.outputs(harness.build(builder))
        graphs: dict[bool, int] = {}
        ways = [measure_way(builder, dense, Way(), graphs)]
        for way in _further_ways(builder, ways[0].dense_graphs) if ways[0].missed else []:
            ways.append(measure_way(builder, dense, way, graphs))
            if not ways[-1].missed:
                break
    best = min(ways, key=lambda way: way.missed)
    kept = [way for way in ways[1:] if way is best or not way.is_right]
    return Row(
        builder.name,
        builder.family,
        builder.model,
        builder.grid,
        (ways[0], *kept),
    )


@dataclass(frozen=True)
class Way:
    """What a user adds.

    Args:
        grid: As for `cs.metadata`, if that is entered.
        text: As for `cs.metadata`, if it is said.
        capture: Whether Dynamo is asked to trace through sizes that depend on data.
    """

    grid: Grid | None = None
    text: Truth | None = None
    capture: bool = False

    def __str__(self) -> str:
        """Return it as the table shows it."""
        sides = {"before": self.text.before, "after": self.text.after} if self.text else {}
        text = ", ".join(f"{side}={length}" for side, length in sides.items() if length)
        said = f", text=cs.Text({text})" if text else ""
        parts = [_CAPTURE] if self.capture else []
        parts += [f"cs.metadata(grid_thw={self.grid}{said})"] if self.grid else []
        return " and ".join(parts)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Apply it."""
        text = cs.Text(self.text.before, self.text.after) if self.text else None
        with ExitStack() as stack:
            if self.grid:
                stack.enter_context(cs.metadata(grid_thw=self.grid, text=text))
            if self.capture:
                stack.enter_context(torch._dynamo.config.patch(dict.fromkeys(_FLAGS, True)))
            yield


_FLAGS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
_CAPTURE = "Dynamo's capture flags"


def _further_ways(builder: Builder, graphs: int) -> list[Way]:
    grid, seen = builder.grid, dict.fromkeys(harness.truths(builder))
    texts = [truth for truth in seen if truth.kind == "video" and truth.before + truth.after]
    said = [Way(grid), *(Way(grid, text) for text in texts)]
    if graphs == 1:
        return said
    captured = [Way(way.grid, way.text, capture=True) for way in said]
    return [*said, Way(capture=True), *captured]


def measure_way(
    builder: Builder,
    dense: torch.Tensor,
    way: Way,
    graphs: dict[bool, int],
) -> Measured:
    """Compile with a spanning and with the narrowest window in one way and compare.

    Args:
        builder: The model.
        dense: Its outputs.
        way: What is added.
        graphs: Number of graphs without us, without and with Dynamo's flags; filled as needed.
    """
    case, axes = harness.build(builder), len(builder.grid)
    truths = harness.truths(builder)
    harness.outputs(case)  # some models keep a table from their first call
    with way.entered():
        if way.capture not in graphs:
            graphs[way.capture] = harness.compile_and_run(case, None).graphs
        spanning = harness.compile_and_run(case, harness.spanning(axes))
        narrow = harness.compile_and_run(case, harness.narrow(axes))
    sites, wrong = harness.sites_of_calls(narrow, truths, builder.grid)
    expected = harness.replay(case, sites, harness.narrow(axes)) if sites else dense
    missed = [
        index
        for index, truth in enumerate(truths)
        if truth.kind == "video" and sites and sites[index] is None
    ]
    exact_error = harness.relative_error(spanning.output, dense)
    narrow_error = harness.relative_error(narrow.output, expected)
    error = max(exact_error, narrow_error)
    return Measured(
        way=str(way),
        calls=len(truths),
        sparse=sum(narrow.executed),
        missed=len(missed),
        outcomes=tuple(site.reason or site.decision for site in narrow.sites),
        details=_details(narrow, missed),
        graphs=narrow.graphs,
        dense_graphs=graphs[way.capture],
        exact_error=exact_error,
        narrow_error=narrow_error,
        tolerance=harness.tolerance(case, sites, harness.narrow(axes), error),
        wrong=tuple(wrong),
    )


def _details(run: harness.Compiled, missed: Sequence[int]) -> tuple[str, ...]:
    sites = harness.sdpa_sites(run.sites)
    chosen: Sequence[Decision] = (
        [sites[index] for index in missed] if len(sites) == len(run.executed) else sites
    )
    seen = [f"{site.reason}: {site.detail}" for site in chosen if site.reason]
    if missed and len(sites) < len(run.executed):
        seen = [UNSEEN, *(line for line in seen if not line.startswith(_EXPECTED))]
    return tuple(dict.fromkeys(seen))
