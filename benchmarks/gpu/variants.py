"""Kernels that are not the default, switched on for the length of a block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager

import torch

from compiled_sparse.ops.routing import uses_gpu_kernels


@contextmanager
def variant(name: str, device: torch.device) -> Iterator[None]:
    """Use a variant inside the block; the CPU's own kernels have none.

    Args:
        name: "boxes" (the bulk copy engine fetches tiles), "pairs" (two blocks of at most 64 slots
            share a product), or empty for the default.
        device: Where the case runs.
    """
    if not name or not uses_gpu_kernels(torch.empty(0, device=device)):
        yield
        return
    from compiled_sparse.kernels import tuning

    with ExitStack() as stack:
        if name == "boxes":
            wish = os.environ.get(tuning.BOXES_VARIABLE)
            os.environ[tuning.BOXES_VARIABLE] = "1"
            stack.callback(_restore, tuning.BOXES_VARIABLE, wish)
        else:
            pairs = tuning.Tile(own=64, other=128, warps=8, stages=1, joined=True)
            for kernel in tuning.KERNELS:
                stack.enter_context(tuning.demanding(kernel, pairs))
        yield


def _restore(variable: str, value: str | None) -> None:
    os.environ.pop(variable)
    if value is not None:
        os.environ[variable] = value
