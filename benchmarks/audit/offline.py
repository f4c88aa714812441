"""Triton without a device: what would be launched on a chip is compiled for it and collected."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import PTXASError

from compiled_sparse.kernels import launch


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: its name, Triton's result or the error, and how it would be launched."""

    kernel: str
    result: Any
    error: str | None
    constants: Mapping[str, Any]
    warps: int
    stages: int


class _NoDevice:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def target_of(chip: str) -> GPUTarget:
    """Return the Triton target of a chip such as `sm_90` or `gfx942`."""
    if chip.startswith("sm_"):
        return GPUTarget("cuda", int(chip[3:]), 32)
    return GPUTarget("hip", chip, 64)


@contextmanager
def compiling_for(chip: str, only: str | None = None) -> Iterator[list[Compiled]]:
    """Compile what `launch.run` is given inside the block instead of launching it.

    Args:
        chip: Such as `sm_90` or `gfx942`.
        only: Name of the one kernel to compile; None means all.

    Yields:
        What was compiled, in order; tensors may be on the CPU.
    """
    compiled: list[Compiled] = []

    def compile_only(
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
    ) -> None:
        if only not in (None, kernel.__name__):
            return
        kernel.device_caches.clear()  # it remembers the previous chip's
        options = {"num_warps": warps, "num_stages": stages}
        result, error = None, None
        try:
            result = kernel.warmup(*arguments, grid=(programs,), **constants, **options)
        except (RuntimeError, PTXASError) as failure:  # the chip's part of the compiler
            error = str(failure).strip().splitlines()[-1]
        compiled.append(Compiled(kernel.__name__, result, error, constants, warps, stages))

    launched, launch.run = launch.run, compile_only
    driver.set_active(_NoDevice(target_of(chip)))
    try:
        yield compiled
    finally:
        launch.run = launched
        driver.set_active(None)  # it is looked up again when needed
