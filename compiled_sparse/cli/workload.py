"""The model and the calls that a calibration measures in, and the progress that it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compiled_sparse.calibration import Call
from compiled_sparse.calibration import CallKey
from compiled_sparse.cli.arguments import require_packages
from compiled_sparse.cli.entry import EntryError
from compiled_sparse.cli.entry import load_entry
from compiled_sparse.errors import CalibrationError

_DEMO_GRID = (5, 12, 12)
_DEMO_STEPS = 2


@dataclass(frozen=True)
class Workload:
    """What is measured in.

    Args:
        model: The model.
        calls: Its calls, one after the other.
    """

    model: Callable[..., Any]
    calls: Iterable[Call]

    @property
    def num_calls(self) -> int | None:
        """How many calls there are, where that is known before they are made."""
        return len(self.calls) if isinstance(self.calls, list | tuple) else None


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a model, and what `measure` takes beside its candidates."""
    parser.add_argument(
        "entry",
        nargs="?",
        metavar="FILE.py:FUNCTION",
        help="function that returns (model, calls), calls being a list or generator of "
        "compiled_sparse.calibration.Call",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="a small Wan transformer with random weights instead, to see how it works",
    )
    parser.add_argument(
        "--journal",
        metavar="FILE",
        help="write each call down as it ends; the same command goes on where it was broken off",
    )
    parser.add_argument(
        "--inner",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="compiler of the model (default %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, progress to stderr"
    )


def load_workload(arguments: argparse.Namespace, other: str | None = None) -> Workload:
    """Return what the arguments name.

    Args:
        arguments: Of a parser that `add_workload_arguments` was called for.
        other: A further flag that could have been given instead, for the error.

    Raises:
        CalibrationError: if nothing is named, or more than one thing.
        EntryError: if the function fails or returns something else.
    """
    if bool(arguments.entry) == arguments.demo:
        flags = ", ".join(filter(None, ("FILE.py:FUNCTION", "--demo", other)))
        raise CalibrationError(
            "a calibration is of one model",
            got=f"{arguments.entry} and --demo" if arguments.demo else "none",
            expected=f"one of {flags}",
            next_step="compiled-sparse calibrate run --demo shows what it looks like",
        )
    return _demo() if arguments.demo else _from_entry(arguments.entry)


def _from_entry(text: str) -> Workload:
    match load_entry(text)():
        case (model, calls) if callable(model) and isinstance(calls, Iterable):
            return Workload(model, calls)
        case other:
            raise EntryError(
                f"{text} returned no model with its calls",
                got=type(other).__name__,
                expected="(model, calls), calls an iterable of compiled_sparse.calibration.Call",
                next_step="return the module and a list such as [Call(kwargs=inputs)]",
            )


def _demo() -> Workload:
    require_packages(("diffusers",), extra="diffusers", purpose="the demo's model")
    from compiled_sparse.cli.wan import build_model

    model = build_model(_DEMO_GRID, layers=2, heads=4, head_dim=64, dtype=torch.float32, seed=0)
    calls = [
        Call(kwargs=model.inputs, key=CallKey(sample="demo", step=step))
        for step in range(_DEMO_STEPS)
    ]
    return Workload(model.module, calls)


@contextmanager
def progress(total: int | None) -> Iterator[Callable[[CallKey], None]]:
    """Show on stderr how many calls were measured and how long the rest will take.

    Args:
        total: How many there are; None where that is not known.

    Raises:
        MissingExtraError: if rich is not installed.
    """
    require_packages(("rich",), extra="calibrate", purpose="the progress of a calibration")
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeElapsedColumn
    from rich.progress import TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("first call, compiling", total=total)

        def done(key: CallKey) -> None:
            bar.update(task, advance=1, description=f"step {key.step}, {key.sample}")

        yield done
