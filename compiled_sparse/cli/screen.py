"""What a command shows while it works and when it is done. Needs rich."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from compiled_sparse.report import Report


class Steps:
    """A progress display over a known number of steps; finished steps stay on the screen.

    Args:
        progress: rich's display.
        total: Number of steps.
    """

    def __init__(self, progress: Any, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Show a step while the block runs, then how long it took.

        Yields:
            A function that adds a note to the step's name.
        """
        note = ""

        def annotate(text: str) -> None:
            nonlocal note
            note = f", {text}"
            self._progress.update(self._task, description=name + note)

        self._progress.update(self._task, description=name)
        start = time.perf_counter()
        yield annotate
        self._progress.console.print(
            f"[dim]{time.perf_counter() - start:5.1f} s[/dim]  {name}{note}",
            highlight=False,
            soft_wrap=True,
        )
        self._progress.advance(self._task)


class Screen:
    """Where a command writes.

    Args:
        to_stderr: Leave standard output to the machine-readable result.
    """

    def __init__(self, *, to_stderr: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=to_stderr)

    @contextmanager
    def steps(self, total: int) -> Iterator[Steps]:
        """Show progress while the block runs."""
        from rich.progress import BarColumn
        from rich.progress import MofNCompleteColumn
        from rich.progress import Progress
        from rich.progress import SpinnerColumn
        from rich.progress import TextColumn
        from rich.progress import TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield Steps(progress, total)

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line of plain text."""
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def table(
        self, title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()
    ) -> None:
        """Print rows of text under a title; numbers are aligned right."""
        from rich.table import Table

        table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 1))
        for index, cell in enumerate(rows[0]):
            name = header[index] if header else ""
            is_number = cell[:1].isdigit()
            table.add_column(name, justify="right" if is_number else "left")
        for row in rows:
            table.add_row(*row)
        self.line()
        self.line(title, style="bold")
        self.console.print(table, highlight=False)

    def report(self, report: Report) -> None:
        """Print what was decided for each attention call."""
        self.line()
        self.console.print(report, highlight=False)
