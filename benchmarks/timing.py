"""Interleaved timing and the facts that belong beside a figure."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.cli.machine import processor_name

WARM_UP_SECONDS = 3.0


def wall_clock(function: Callable[[], Any]) -> float:
    """Return the seconds one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved_medians(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[Callable[[], Any]], float] = wall_clock,
    warm_up_seconds: float = WARM_UP_SECONDS,
) -> dict[str, float]:
    """Time functions in turns, so that a noisy moment hits all of them.

    Args:
        functions: What to time, by name.
        rounds: How often each is timed.
        clock: Returns the seconds one call takes.
        warm_up_seconds: How long all are called in turns before timing, as memory and clock take
            some seconds to settle; 0 for not at all.

    Returns:
        Median seconds by name.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < warm_up_seconds:
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(clock(function))
    return {name: statistics.median(values) for name, values in seconds.items()}


def backward_medians(
    functions: Mapping[str, Callable[..., Tensor]], inputs: Sequence[Tensor], rounds: int
) -> dict[str, float]:
    """Time the backward alone of functions of the same tensors, in turns.

    Args:
        functions: By name, each called with all inputs.
        inputs: Tensors; gradients of those that a function makes no use of are not computed.
        rounds: How often each is timed.

    Returns:
        Median seconds by name.
    """
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    outputs = {name: function(*leaves) for name, function in functions.items()}
    grad = torch.randn_like(next(iter(outputs.values())))

    def backward(output: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(
            output, leaves, grad, retain_graph=True, allow_unused=True
        )

    return interleaved_medians({name: backward(output) for name, output in outputs.items()}, rounds)


def ratios(seconds: Mapping[str, float], density: float) -> dict[str, Any]:
    """Return times of functions, "dense" among them, as ratios.

    Args:
        seconds: By name.
        density: Share of the dense work that has to be done, whose inverse is the limit.
    """
    speed_up = {name: seconds["dense"] / value for name, value in seconds.items()}
    return {
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "speed_up_over_dense": speed_up,
        "fraction_of_limit": {name: value * density for name, value in speed_up.items()},
    }


def environment() -> dict[str, Any]:
    """Return the machine and the versions a result was measured with."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or "unknown"
