"""The one place where kernels are launched."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def run(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    *,
    warps: int = 4,
    stages: int = 1,
) -> None:
    """Launch `programs` programs of a kernel on the device of its first argument, if any.

    Args:
        kernel: A function under `triton.jit`.
        programs: Number of programs, on one axis.
        arguments: Run-time arguments in order; the first is a tensor.
        constants: Compile-time arguments by name.
        warps: Warps per program.
        stages: Depth of the software pipeline.
    """
    if programs == 0:
        return
    with on_device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages)


def on_device_of(tensor: Tensor) -> Any:
    """Return a context in which the device of a tensor is the current one.

    Triton launches on the current device, which need not be that of the tensors.
    """
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()
