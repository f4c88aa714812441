"""One run of an example: its models, its data and its files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from moving_shapes._data import CHANNELS
from moving_shapes._data import FRAMES
from moving_shapes._data import HEIGHT
from moving_shapes._data import WIDTH
from moving_shapes._data import Batch
from moving_shapes._data import batches
from moving_shapes._data import held_out
from moving_shapes._model import PATCH
from moving_shapes._model import VideoDiT
from moving_shapes._report import progress
from moving_shapes._training import Curve
from moving_shapes._training import Velocity
from moving_shapes._training import cosine
from moving_shapes._training import evaluate
from moving_shapes._training import optimiser
from moving_shapes._training import train
from moving_shapes._training import warm_up

if TYPE_CHECKING:
    from rich.console import Console

GRID = (FRAMES // PATCH[0], HEIGHT // PATCH[1], WIDTH // PATCH[2])
RATE = 3e-3
HELD_OUT_SEED = 1_000_000  # the same videos for every run


class Run:
    """Models of one run of an example, and what they are trained and evaluated on.

    Args:
        arguments: Those of the command line.
        console: Where progress is shown.
    """

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments = arguments
        self.console = console
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        count = arguments.held_out // arguments.batch
        self.held_out = held_out(arguments.batch, count, HELD_OUT_SEED)

    def new_model(self) -> VideoDiT:
        """Return a model with the first weights of this seed."""
        torch.manual_seed(self.arguments.seed)
        return VideoDiT(CHANNELS, GRID)

    def evaluate(self, model: Velocity) -> float:
        """Return the loss on the held-out videos.

        Args:
            model: The model.
        """
        return evaluate(model, self.held_out)

    def train_dense(self, model: nn.Module) -> Velocity:
        """Train a new model; return it compiled.

        Args:
            model: The model.
        """
        compiled: Velocity = torch.compile(model, backend=self.arguments.inner)
        steps = self.arguments.steps
        adam = optimiser(model, RATE)
        with progress(self.console, "training, dense", steps) as show:
            train(
                compiled,
                batches(self.arguments.batch, self.arguments.seed),
                adam,
                warm_up(),
                steps,
                after=lambda _, loss: show(loss),
            )
        return compiled

    def finetuning_data(self) -> Iterator[Batch]:
        """Return the batches that every copy is fine-tuned on."""
        return batches(self.arguments.batch, self.arguments.seed + 1000)

    def fine_tune(
        self,
        title: str,
        model: nn.Module,
        compiled: Velocity,
        *,
        steps: int | None = None,
        data: Iterator[Batch] | None = None,
        curve: Curve | None = None,
        around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
    ) -> Curve:
        """Fine-tune what needs a gradient on the batches that every copy gets; return the losses.

        Args:
            title: What is done.
            model: The model, with its learned layers.
            compiled: The same, compiled.
            steps: Number of steps; None: that of the arguments.
            data: The batches that are left; None: all.
            curve: Losses of the steps before these, to be continued.
            around: What holds around forward and backward of a step.
        """
        steps = self.arguments.finetune_steps if steps is None else steps
        curve = Curve() if curve is None else curve
        before, every = len(curve.train), max(1, steps // 5)

        def after(done: int, loss: float) -> None:
            show(loss)
            curve.train.append(loss)
            if done % every == 0 or done == steps:
                curve.evaluated[before + done] = self.evaluate(compiled)

        if before not in curve.evaluated:
            curve.evaluated[before] = self.evaluate(compiled)
        adam = optimiser(model, RATE / 2)
        data = self.finetuning_data() if data is None else data
        with progress(self.console, title, steps) as show:
            train(compiled, data, adam, cosine(steps), steps, around=around, after=after)
        return curve

    def attached(self, policy: cs.VSA | cs.STA | cs.SLA, path: Path) -> tuple[nn.Module, Velocity]:
        """Return a sparse model with the weights of a file, and the same compiled.

        Args:
            policy: The mechanism.
            path: A checkpoint; learned layers that it does not have stay zero.
        """
        from safetensors.torch import load_file

        model = self.new_model()
        handle = cs.attach(model, policy)
        report = handle.load_state_dict(load_file(path))
        self.console.print(f"{path.name}: {len(report.found)} learned parameters found, "
                           f"{len(report.zero_filled)} set to zero")  # fmt: skip
        options = {"inner": self.arguments.inner}
        return model, torch.compile(model, backend="compiled_sparse", options=options)

    def save(self, state_dict: Mapping[str, Tensor], name: str) -> Path:
        """Write a model's parameters, learned layers among them; return where.

        Args:
            state_dict: The parameters.
            name: Name of the file.
        """
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        save_file(dict(state_dict), path)
        return path
