"""What the training example shows: a progress bar, a table, and the loss curves."""

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

_DENSE, _SPARSE, _RAMP = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito
_SMOOTHING = 0.98  # batches are small and times random: single losses differ tenfold


def require_extras() -> None:
    """Check what the example needs beside the package, before minutes of training.

    Raises:
        MissingExtraError: if a package of the train extra is not installed.
    """
    for package in ("matplotlib", "rich", "safetensors"):
        try:
            importlib.import_module(package)
        except ImportError:
            purpose = "the training example"
            raise MissingExtraError(package, extra="train", purpose=purpose) from None


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


def plot(path: Path, dense: Curve, sparse: Curve) -> None:
    """Draw the losses of fine-tuning side by side, the sparsity on a second axis.

    Args:
        path: The PNG to write.
        dense: The dense run.
        sparse: The sparse run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    _draw(axes[0], dense, _DENSE, "dense")
    _draw(axes[1], sparse, _SPARSE, "VSA")
    axes[0].set_ylabel("flow matching loss")
    final = list(dense.evaluated.values())[-1]
    axes[1].axhline(final, color=_DENSE, linestyle=":", label="held out, dense at the end")
    held_out = [*dense.evaluated.values(), *sparse.evaluated.values()]
    losses = [*_smoothed(dense.train), *_smoothed(sparse.train), *held_out]
    axes[0].set_ylim(0.98 * min(losses), 1.08 * max(losses))
    ramp = axes[1].twinx()
    ramp.plot(range(1, len(sparse.sparsity) + 1), sparse.sparsity, color=_RAMP, linewidth=1)
    ramp.set_ylabel("sparsity", color=_RAMP)
    ramp.set_ylim(0, 1.5)  # above the ramp is the legend
    for each in axes:
        each.legend(loc="upper right", fontsize=8)
    figure.savefig(path)


def _draw(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    steps = range(1, len(curve.train) + 1)
    axes.plot(steps, _smoothed(curve.train), color=colour, alpha=0.6, label="training, smoothed")
    done, losses = list(curve.evaluated), list(curve.evaluated.values())
    axes.plot(done, losses, "o", color=colour, markeredgecolor="black", label="held out")
    axes.set_title(f"fine-tuning: {name}")
    axes.set_xlabel("step")


def _smoothed(values: list[float]) -> list[float]:
    """Return the running mean, in which old values fade; the first few count alike."""
    means: list[float] = []
    for count, value in enumerate(values, start=1):
        share = max(1 - _SMOOTHING, 1 / count)
        means.append(value if count == 1 else means[-1] + share * (value - means[-1]))
    return means
