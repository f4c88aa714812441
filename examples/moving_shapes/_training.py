"""Flow matching: its loss, the training loop, and the evaluation on a fixed set."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import nullcontext
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

from moving_shapes._data import CHANNELS
from moving_shapes._data import Batch

Velocity = Callable[[Tensor, Tensor], Tensor]
GATE, PROJECTION = "to_gate_compress", "proj_l"
LEARNED_RATE = 5.0  # what attaching adds starts at zero and has few steps to get anywhere


@dataclass
class Curve:
    """What a training run leaves for the plot.

    Args:
        train: Loss of each step.
        evaluated: Loss on the fixed set, by number of steps done.
        sparsity: Sparsity of each step, if it changes.
        stages: Number of steps done when another stage began.
    """

    train: list[float] = field(default_factory=list)
    evaluated: dict[int, float] = field(default_factory=dict)
    sparsity: list[float] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)


def flow_loss(model: Velocity, batch: Batch) -> Tensor:
    """Return the mean squared error of the velocity; the first frame is given and not counted.

    Args:
        model: Returns a velocity [batch, channels, frames, height, width] for the noisy video,
            with one more channel that is 1 where the video is given, and the time [batch].
        batch: Videos, noise and times.
    """
    time = batch.time.view(-1, 1, 1, 1, 1)
    given = torch.zeros_like(batch.clean[:, :1])
    given[:, :, 0] = 1
    noisy = torch.lerp(batch.clean, batch.noise, time * (1 - given))
    velocity = model(torch.cat([noisy, given], dim=1), batch.time)
    return F.mse_loss(velocity[:, :, 1:], (batch.noise - batch.clean)[:, :, 1:])


def optimiser(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW with the learned layers in a group of their own: faster, and not decayed.

    Args:
        model: The model, attached already where it is sparse: the learned layers come with that.
            What needs no gradient is left out.
        rate: Learning rate of everything else.
    """
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[is_learned(name)].append(parameter)
    others = {"params": groups[False], "lr": rate, "weight_decay": 0.01}
    learned = {"params": groups[True], "lr": LEARNED_RATE * rate, "weight_decay": 0.0}
    given = [group for group in (others, learned) if group["params"]]
    return torch.optim.AdamW(given, betas=(0.9, 0.98))


def is_learned(name: str) -> bool:
    """Return whether a parameter belongs to a layer that attaching has added.

    Args:
        name: Its full name.
    """
    return not {GATE, PROJECTION}.isdisjoint(name.split("."))


def warm_up(steps: int = 30) -> Callable[[int], float]:
    """Return the share of the learning rate by step: a straight line, then all of it.

    Args:
        steps: Steps until all of it.
    """
    return lambda step: min(1.0, (step + 1) / steps)


def cosine(steps: int, warm: int = 10) -> Callable[[int], float]:
    """Return the share of the learning rate by step: up, then along a cosine down to nothing.

    Args:
        steps: Steps until nothing.
        warm: Steps until the optimiser knows the gradients' sizes.
    """
    rise = warm_up(warm)
    return lambda step: rise(step) * (1 + math.cos(math.pi * step / steps)) / 2


def train(
    model: Velocity,
    data: Iterator[Batch],
    adam: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    steps: int,
    *,
    around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train for a number of steps.

    Args:
        model: The compiled model.
        data: Batches.
        adam: The optimiser.
        schedule: Share of the learning rate, by step.
        steps: Number of steps.
        around: What holds around forward and backward of a step: a backward pass may compute
            parts of the forward pass again, and must then know the same.
        after: Called with the number of steps done and the loss.
    """
    rates = torch.optim.lr_scheduler.LambdaLR(adam, schedule)
    parameters = [each for group in adam.param_groups for each in group["params"]]
    for step in range(steps):
        with around(step):
            loss = flow_loss(model, next(data))
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        rates.step()
        after(step + 1, loss.item())


def evaluate(model: Velocity, held_out: Iterable[Batch]) -> float:
    """Return the mean loss over fixed batches.

    Gradients stay on: without them `torch.compile` would make a second program.

    Args:
        model: The model.
        held_out: The batches, with their noise and times.
    """
    losses = [flow_loss(model, batch).item() for batch in held_out]
    return sum(losses) / len(losses)


def predict_zero(video: Tensor, time: Tensor) -> Tensor:
    """Return a velocity of zero: the loss of knowing nothing.

    Args:
        video: The noisy video, and 1 where it is given.
        time: The time of the diffusion.
    """
    return torch.zeros_like(video[:, :CHANNELS])
