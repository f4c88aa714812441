"""One run of examples/train_moving_shapes.py: its models, its data and its files."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import compiled_sparse as cs
from moving_shapes._data import CHANNELS
from moving_shapes._data import FRAMES
from moving_shapes._data import HEIGHT
from moving_shapes._data import WIDTH
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

GATE = "to_gate_compress"
GRID = (FRAMES // PATCH[0], HEIGHT // PATCH[1], WIDTH // PATCH[2])
RATE = 3e-3
HELD_OUT_SEED = 1_000_000  # the same videos for every run
RAMP_SHARE, RAMP_RATE = 0.3, 0.05  # of fine-tuning; of sparsity at a time


class Run:
    """Models of one run of the example, and what they are trained and evaluated on.

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
        """Return the loss on the held-out videos, at the sparsity that is the target.

        Args:
            model: The model; one without sparse attention does not mind the sparsity.
        """
        with cs.metadata(sparsity=self.arguments.sparsity):
            return evaluate(model, self.held_out)

    def train_dense(self, model: nn.Module) -> Velocity:
        """Train a new model; return it compiled.

        Args:
            model: The model.
        """
        compiled: Velocity = torch.compile(model, backend=self.arguments.inner)
        steps = self.arguments.steps
        adam = optimiser(model, RATE, GATE)
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

    def fine_tune(self, title: str, model: nn.Module, compiled: Velocity, ramp: bool) -> Curve:
        """Fine-tune on the batches that every copy gets; return the losses.

        Args:
            title: What is done.
            model: The model, with its gates.
            compiled: The same, compiled.
            ramp: Whether it starts dense and becomes sparse step by step.
        """
        steps, curve = self.arguments.finetune_steps, Curve()
        every = max(1, steps // 5)

        def around(step: int) -> AbstractContextManager[None]:
            if not ramp:
                return nullcontext()
            curve.sparsity.append(self.sparsity(step))
            return cs.metadata(sparsity=curve.sparsity[-1])

        def after(done: int, loss: float) -> None:
            show(loss)
            curve.train.append(loss)
            if done % every == 0 or done == steps:
                curve.evaluated[done] = self.evaluate(compiled)

        curve.evaluated[0] = self.evaluate(compiled)
        adam = optimiser(model, RATE / 2, GATE)
        data = batches(self.arguments.batch, self.arguments.seed + 1000)
        with progress(self.console, title, steps) as show:
            train(compiled, data, adam, cosine(steps), steps, around=around, after=after)
        return curve

    def sparsity(self, step: int) -> float:
        """Return the sparsity of a step of fine-tuning.

        Args:
            step: Steps done before it.
        """
        target = self.arguments.sparsity
        increases = target / RAMP_RATE
        interval = max(1, int(RAMP_SHARE * self.arguments.finetune_steps / max(increases, 1)))
        return cs.sparsity_ramp(step, target=target, rate=RAMP_RATE, interval=interval)

    def attached(self, policy: cs.VSA | cs.STA, path: Path) -> tuple[nn.Module, Velocity]:
        """Return a sparse model with the weights of a file, and the same compiled.

        Args:
            policy: The mechanism.
            path: A checkpoint; gates that it does not have stay zero.
        """
        from safetensors.torch import load_file

        model = self.new_model()
        handle = cs.attach(model, policy)
        report = handle.load_state_dict(load_file(path))
        self.console.print(f"{path.name}: {len(report.found)} parameters of gates found, "
                           f"{len(report.zero_filled)} set to zero")  # fmt: skip
        options = {"inner": self.arguments.inner}
        return model, torch.compile(model, backend="compiled_sparse", options=options)

    def save(self, model: nn.Module, name: str) -> Path:
        """Write a model's parameters, gates among them; return where.

        Args:
            model: The model.
            name: Name of the file.
        """
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        return path
