"""One run of examples/train_moving_shapes.py: what a sparsity that grows adds to it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

import compiled_sparse as cs
from moving_shapes._run import Run
from moving_shapes._training import Curve
from moving_shapes._training import Velocity

RAMP_SHARE, RAMP_RATE = 0.3, 0.05  # of fine-tuning; of sparsity at a time


class RampRun(Run):
    """A run whose arguments name the sparsity that is the target."""

    def evaluate(self, model: Velocity) -> float:
        """Return the loss on the held-out videos, at the sparsity that is the target.

        Args:
            model: The model; one without sparse attention does not mind the sparsity.
        """
        with cs.metadata(sparsity=self.arguments.sparsity):
            return super().evaluate(model)

    def fine_tune_ramped(self, title: str, model: nn.Module, compiled: Velocity) -> Curve:
        """Fine-tune a model that starts dense and becomes sparse step by step.

        Args:
            title: What is done.
            model: The model, with its gates.
            compiled: The same, compiled.
        """
        curve = Curve()

        def around(step: int) -> AbstractContextManager[None]:
            curve.sparsity.append(self.sparsity(step))
            return cs.metadata(sparsity=curve.sparsity[-1])

        return self.fine_tune(title, model, compiled, curve=curve, around=around)

    def sparsity(self, step: int) -> float:
        """Return the sparsity of a step of fine-tuning.

        Args:
            step: Steps done before it.
        """
        target = self.arguments.sparsity
        increases = target / RAMP_RATE
        interval = max(1, int(RAMP_SHARE * self.arguments.finetune_steps / max(increases, 1)))
        return cs.sparsity_ramp(step, target=target, rate=RAMP_RATE, interval=interval)
