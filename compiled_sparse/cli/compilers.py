"""Whether inductor works on this machine."""

from __future__ import annotations

import torch
from torch._dynamo.exc import BackendCompilerFailed


def inductor_failure() -> BackendCompilerFailed | None:
    """Compile a small function, and return what failed, if anything did."""
    try:
        torch.compile(_add_one, backend="inductor")(torch.zeros(7))
    except BackendCompilerFailed as error:
        return error
    return None


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0]


def _add_one(value: torch.Tensor) -> torch.Tensor:
    return value + 1
