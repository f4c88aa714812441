"""What the examples show: a progress bar, a table, and the loss curves."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compiled_sparse.errors import MissingExtraError
from moving_shapes._training import Curve

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from rich.console import Console

_DENSE, _SPARSE, _CHANGE = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito
_SMOOTHING = 0.98  # batches are small and times random: single losses differ tenfold


def new_console() -> Console:
    """Return where an example shows what it does, which needs more than the package.

    Raises:
        MissingExtraError: if a package of the train extra is not installed.
    """
    for package in ("matplotlib", "rich", "safetensors"):
        try:
            importlib.import_module(package)
        except ImportError:
            purpose = "the training example"
            raise MissingExtraError(package, extra="train", purpose=purpose) from None
    from rich.console import Console

    console = Console()
    console.print("The first step of each kind compiles, the first sparse one builds a C++ kernel.")
    return console


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Callable[[float], None]]:
    """Show a bar; what is yielded advances it by a step and shows the loss.

    Args:
        console: Where to.
        title: What is done.
        steps: Number of steps.
    """
    from rich.progress import BarColumn
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeElapsedColumn

    columns = ("[bold]{task.description:24}", BarColumn(), MofNCompleteColumn())
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, TimeElapsedColumn(), loss, console=console) as bar:
        task = bar.add_task(title, total=steps, loss=float("nan"))
        yield lambda value: bar.update(task, advance=1, loss=value)


def print_table(console: Console, losses: Mapping[str, float], baseline: str) -> None:
    """Print losses, and how far each is above one of them.

    Args:
        console: Where to.
        losses: Evaluation loss by name.
        baseline: The name to compare with.
    """
    from rich.table import Table

    table = Table(title="Loss on the held-out videos")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column("against dense", justify="right")
    for name, loss in losses.items():
        gap = "" if name == baseline else f"{gap_percent(loss, losses[baseline]):+.1f} %"
        table.add_row(name, f"{loss:.4f}", gap)
    console.print(table)


def gap_percent(loss: float, baseline: float) -> float:
    """Return by how many percent a loss is above another.

    Args:
        loss: The loss.
        baseline: What it is compared with.
    """
    return 100 * (loss / baseline - 1)


def plot(path: Path, curves: Mapping[str, Curve]) -> None:
    """Draw the losses of fine-tuning side by side.

    Args:
        path: The PNG to write.
        curves: By name; the others are compared with the first, which is dense.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 4), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True)
    dense, *_ = curves.values()
    final = list(dense.evaluated.values())[-1]
    for each, (name, curve) in zip(axes, curves.items(), strict=True):
        _draw(each, curve, _DENSE if curve is dense else _SPARSE, name)
        if curve is not dense:
            each.axhline(final, color=_DENSE, linestyle=":", label="held out, dense at the end")
        _draw_changes(each, curve)
        each.legend(loc="upper right", fontsize=8)
    axes[0].set_ylabel("flow matching loss")
    losses = [loss for curve in curves.values() for loss in _shown(curve)]
    axes[0].set_ylim(0.98 * min(losses), 1.08 * max(losses))
    figure.savefig(path)


def _draw(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    steps = range(1, len(curve.train) + 1)
    axes.plot(steps, _smoothed(curve.train), color=colour, alpha=0.6, label="training, smoothed")
    done, losses = list(curve.evaluated), list(curve.evaluated.values())
    axes.plot(done, losses, "o", color=colour, markeredgecolor="black", label="held out")
    axes.set_title(f"fine-tuning: {name}")
    axes.set_xlabel("step")


def _draw_changes(axes: Axes, curve: Curve) -> None:
    """Draw what changed during a run: its stages, and its sparsity on a second axis."""
    for step in curve.stages:
        axes.axvline(step, color=_CHANGE, linewidth=1, label="all weights from here on")
    if curve.sparsity:
        ramp = axes.twinx()
        ramp.plot(range(1, len(curve.sparsity) + 1), curve.sparsity, color=_CHANGE, linewidth=1)
        ramp.set_ylabel("sparsity", color=_CHANGE)
        ramp.set_ylim(0, 1.5)  # above the ramp is the legend


def _shown(curve: Curve) -> list[float]:
    """Return all losses of a curve that are drawn."""
    return [*_smoothed(curve.train), *curve.evaluated.values()]


def _smoothed(values: list[float]) -> list[float]:
    """Return the running mean, in which old values fade; the first few count alike."""
    means: list[float] = []
    for count, value in enumerate(values, start=1):
        share = max(1 - _SMOOTHING, 1 / count)
        means.append(value if count == 1 else means[-1] + share * (value - means[-1]))
    return means
