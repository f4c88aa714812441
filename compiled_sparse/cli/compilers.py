"""Whether inductor works on this machine."""

from __future__ import annotations

import torch
from torch._dynamo.exc import BackendCompilerFailed

from compiled_sparse.errors import CompiledSparseError


class InnerCompilerError(CompiledSparseError, RuntimeError):
    """The inner compiler that was asked for does not work on this machine."""


def inductor_failure() -> BackendCompilerFailed | None:
    """Compile a small function, and return what failed, if anything did."""
    try:
        torch.compile(_add_one, backend="inductor")(torch.zeros(7))
    except BackendCompilerFailed as error:
        return error
    return None


def require_inductor(*, otherwise: str) -> None:
    """Check that inductor works.

    Args:
        otherwise: What to do without it, after "or".

    Raises:
        InnerCompilerError: if it does not.
    """
    failure = inductor_failure()
    if failure is not None:
        raise InnerCompilerError(
            "inductor does not work on this machine",
            got=first_line(failure),
            expected="a C++ compiler that inductor finds",
            next_step=f"install one (Debian: apt install g++), or {otherwise}",
        ) from failure


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0]


def _add_one(value: torch.Tensor) -> torch.Tensor:
    return value + 1
