"""What the demo measures: agreement with the reference, and time per forward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.geometry import whole_gain

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest accepted relative error: the rounding of a few layers in that dtype."""


@dataclass(frozen=True)
class Agreement:
    """How far two outputs are apart.

    Args:
        max_error: Largest absolute difference.
        relative_error: Norm of the difference over the norm of what was expected.
        tolerance: Largest accepted relative error.
    """

    max_error: float
    relative_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the relative error is within the tolerance; NaN is not."""
        return self.relative_error <= self.tolerance


def compare(actual: Tensor, expected: Tensor) -> Agreement:
    """Compare an output with the expected one, both of the same shape and dtype."""
    difference = actual.double() - expected.double()
    relative = difference.norm() / expected.double().norm()
    return Agreement(difference.abs().max().item(), relative.item(), TOLERANCE[expected.dtype])


@dataclass(frozen=True)
class Timing:
    """Seconds per forward, medians over interleaved rounds.

    Args:
        rounds: Number of rounds.
        dense: The compiled dense model.
        sparse: The compiled sparse model.
        dense_attention: The dense model's video self-attention alone, all layers.
        density: Fraction of (query, key) pairs attended.
    """

    rounds: int
    dense: float
    sparse: float
    dense_attention: float
    density: float

    @property
    def speedup(self) -> float:
        """How many times faster the sparse model ran."""
        return self.dense / self.sparse

    @property
    def ideal(self) -> float:
        """The speed-up if attention took `density` of its dense time and the rest stayed as it was.

        A sparse kernel that is better than the dense one goes beyond it. Attention is timed on its
        own, so that noise may make it longer than the whole model; it counts for at most that.
        """
        share = min(self.dense_attention / self.dense, 1.0)
        return whole_gain(share, 1.0 / self.density)


def medians(
    calls: Mapping[str, Callable[[], object]], rounds: int, on_round: Callable[[], None]
) -> dict[str, float]:
    """Time calls in turn, so that a slow moment of the machine meets all of them.

    Args:
        calls: What to time, by name; each is already compiled.
        rounds: How often each is run.
        on_round: Called after each round.

    Returns:
        Median seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        on_round()
    return {name: statistics.median(values) for name, values in seconds.items()}


def dense_attention_call(
    tokens: int, *, layers: int, heads: int, head_dim: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a call that does the dense self-attention of a whole forward and nothing else."""
    shape = (1, tokens, heads, head_dim)
    query, key, value = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3))

    def call() -> None:
        for _ in range(layers):
            F.scaled_dot_product_attention(query, key, value)

    return call
