"""What was done to each attention call, as data: logs, `explain`, tests and docs read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from compiled_sparse.config import MechanismConfig
from compiled_sparse.reasons import REASONS

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One attention call and what became of it.

    Args:
        path: Dotted module path, empty outside any module.
        kind: "self", "cross", "joint" or "other".
        decision: "sparse" or "dense".
        mechanism: Spec string of the chosen config, empty for dense calls.
        config_origin: Who asked for the config: "force", "environment", "module", "options" or
            "auto"; empty where the layout was refused before anyone was asked.
        schedule: The policy's schedule in words, empty if it has none.
        reason: Code from `compiled_sparse.reasons`, empty for sparse calls.
        detail: What was seen, in words.
        query_shape: [batch, heads, length, head_dim] at compile time.
        key_shape: The same for the keys.
        dtype: Name of the queries' dtype.
        mask: What the call's mask is proven to be: "key_padding", "query_and_key_padding",
            "all_true" (left out), "other" where nothing is proven, empty without a mask.
        grid_thw: Token grid, where one is known.
        text_before: Text tokens in front of the video.
        text_after: Text tokens behind it.
        layout_origin: "graph", "metadata" or "attach", where a layout is known.
        layer: Index among the video attention layers of the model, where the graph shows it.
        dynamic: Whether a size of the layout is symbolic; the numbers are then examples.
        density: Fraction of (query, key) pairs attended, counted; 1.0 for dense calls.
        predicted_gain: Predicted speed-up of this call over dense attention; 1.0 for dense calls.
        config: The chosen config itself, for pictures; None for dense calls. It is no part of the
            JSON and of comparisons: `mechanism` is its text.
    """

    path: str
    kind: str
    decision: str
    mechanism: str = ""
    config_origin: str = ""
    schedule: str = ""
    reason: str = ""
    detail: str = ""
    query_shape: tuple[int, ...] = ()
    key_shape: tuple[int, ...] = ()
    dtype: str = ""
    mask: str = ""
    grid_thw: tuple[int, ...] | None = None
    text_before: int = 0
    text_after: int = 0
    layout_origin: str = ""
    layer: int | None = None
    dynamic: bool = False
    density: float = 1.0
    predicted_gain: float = 1.0
    config: MechanismConfig | None = field(default=None, repr=False, compare=False)

    @property
    def is_sparse(self) -> bool:
        """Whether the call was rewritten."""
        return self.decision == "sparse"


@dataclass(frozen=True)
class Report:
    """All attention calls of a model, in execution order.

    Args:
        sites: One decision per call.
        num_graphs: Number of graphs the model was compiled into; more than one means graph breaks.
        strict_problems: What `strict` would raise, one line each.
    """

    sites: tuple[Decision, ...]
    num_graphs: int = 1
    strict_problems: tuple[str, ...] = ()

    @property
    def num_sparse(self) -> int:
        """Number of rewritten calls."""
        return sum(site.is_sparse for site in self.sites)

    def summary(self) -> str:
        """Return one line: how many calls became sparse, how dense they are, why others did not."""
        sparse = [site for site in self.sites if site.is_sparse]
        parts = [f"{len(sparse)} of {len(self.sites)} attention calls sparse"]
        if sparse:
            density = sum(site.density for site in sparse) / len(sparse)
            parts.append(f"density {density:.3f}")
        reasons = _counts(site.reason for site in self.sites if site.reason)
        parts += [f"{count} {reason}" for reason, count in reasons.items()]
        if self.num_graphs != 1:
            parts.append(f"{self.num_graphs} graphs")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with a version."""
        return {
            "version": REPORT_VERSION,
            "num_graphs": self.num_graphs,
            "strict_problems": list(self.strict_problems),
            "sites": [_plain(site) for site in self.sites],
        }

    def to_json(self) -> str:
        """Return the report as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML page that needs nothing else; needs matplotlib.

        Args:
            path: File to write; a folder that is missing is made.

        Returns:
            The absolute path of the page.

        Raises:
            MissingExtraError: if there is a pattern to draw and matplotlib is not installed.
        """
        from compiled_sparse.report_page import write_page

        return write_page(self, path)

    def notes(self) -> list[str]:
        """Return one line per schedule, and one per origin that overrides the options."""
        schedules = _counts(site.schedule for site in self.sites if site.schedule)
        origins = _counts(
            site.config_origin for site in self.sites if site.config_origin in _OVERRIDES
        )
        return [
            *(f"schedule of {count} calls: {text}" for text, count in schedules.items()),
            *(f"policy of {count} calls: {_OVERRIDES[name]}" for name, count in origins.items()),
        ]

    def rows(self) -> list[dict[str, str]]:
        """Return one mapping from column title to text per group of like calls.

        Calls that differ only in a number of their path share a row: `blocks.{0-29}.attn1`. There
        is a column for masks if any call has one.
        """
        groups: dict[tuple[str, ...], list[str]] = {}
        for site in self.sites:
            groups.setdefault((_template(site.path), *_cells(site).values()), []).append(site.path)
        rows = [_row(key, paths) for key, paths in groups.items()]
        if not any(site.mask for site in self.sites):
            for row in rows:
                del row["mask"]
        return rows

    def __str__(self) -> str:
        """Return a plain-text table with the summary and the meaning of each reason."""
        rows = self.rows()
        lines = [self.summary()]
        if rows:
            lines += aligned(rows)
        lines += self.notes()
        seen = _counts(site.reason for site in self.sites if site.reason)
        lines += [f"{reason}: {REASONS[reason]}" for reason in seen]
        return "\n".join(lines)

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        """Render for a terminal of 80 columns; used by `rich.print(report)`."""
        from rich.table import Table
        from rich.text import Text as Line

        rows = self.rows()
        yield Line(self.summary(), style="bold")
        table = Table(box=None, pad_edge=False)
        for title in _TABLE_TITLES if rows else ():
            table.add_column(title, overflow="fold")
        for row in rows:
            style = "green" if row["decision"] == "sparse" else "dim"
            table.add_row(*(row[title] for title in _TABLE_TITLES), style=style)
        yield table
        for row in rows:
            rest = {k: v for k, v in row.items() if k not in _TABLE_TITLES and v not in ("", "-")}
            yield Line(f"{row['site']}: " + ", ".join(f"{k} {v}" for k, v in rest.items()))
        yield from map(Line, self.notes())
        for reason in _counts(site.reason for site in self.sites if site.reason):
            yield Line.assemble((reason, "bold"), f": {REASONS[reason]}")


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of a plain-text table, titles first.

    Args:
        rows: At least one mapping from column title to text, all with the same titles.
    """
    titles = list(rows[0])
    widths = {t: max(len(t), *(len(row[t]) for row in rows)) for t in titles}
    cells = ({title: title for title in titles}, *rows)
    return ["  ".join(row[t].ljust(widths[t]) for t in titles).rstrip() for row in cells]


_OVERRIDES = {
    "force": "from cs.force",
    "environment": "from COMPILED_SPARSE_BACKEND",
    "module": "from the module itself",
}
_TABLE_TITLES = ("site", "kind", "q/k length", "decision", "density", "gain")


def _plain(site: Decision) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(site, config=None))
    del values["config"]
    return values


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _template(path: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def _cells(site: Decision) -> dict[str, str]:
    grid = "x".join(map(str, site.grid_thw)) if site.grid_thw else "-"
    text = f"{site.text_before}+{site.text_after}" if site.text_before + site.text_after else "-"
    why = site.reason or site.detail
    lengths = f"{_length(site.query_shape)}/{_length(site.key_shape)}"
    return {
        "kind": site.kind,
        "heads": str(site.query_shape[1]) if len(site.query_shape) == 4 else "-",
        "q/k length": lengths + ("*" if site.dynamic else ""),
        "grid": grid,
        "text": text,
        "mask": site.mask or "-",
        "decision": site.decision,
        "mechanism": site.mechanism or "-",
        "density": f"{site.density:.3f}",
        "gain": f"{site.predicted_gain:.1f}x" if site.is_sparse else "-",
        "reason": f"{site.reason} ({site.detail})" if site.reason and site.detail else why,
    }


def _length(shape: tuple[int, ...]) -> str:
    return str(shape[-2]) if len(shape) > 1 else "-"


def _row(key: tuple[str, ...], paths: list[str]) -> dict[str, str]:
    titles = _cells(Decision(path="", kind="", decision=""))
    return {"site": _join_paths(paths), **dict(zip(titles, key[1:], strict=True))}


def _join_paths(paths: list[str]) -> str:
    parts = [path.split(".") for path in paths]
    joined = [_join_numbers(column) for column in zip(*parts, strict=True)]
    count = f" ({len(paths)} calls)" if len(paths) > 1 else ""
    return (".".join(joined) or "(no module)") + count


def _join_numbers(column: tuple[str, ...]) -> str:
    if not all(part.isdigit() for part in column) or len(set(column)) == 1:
        return column[0]
    numbers = sorted({int(part) for part in column})
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


ReportSink = Callable[[Report], None]
