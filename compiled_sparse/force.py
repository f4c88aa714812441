"""`force`: one policy for everything inside a block, whatever else was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from compiled_sparse.policy import Policy
from compiled_sparse.policy import PolicyLike
from compiled_sparse.policy import as_policy

_forced: ContextVar[Policy | None] = ContextVar("compiled_sparse_forced", default=None)


def forced() -> Policy | None:
    """Return the policy of the innermost `force` block of this thread, or None."""
    return _forced.get()


@contextmanager
def force(policy: PolicyLike) -> Iterator[None]:
    """Override the policy of every call inside the block, of models compiled earlier too.

    Blocks nest; leaving one, by an exception too, restores what was forced before. Each thread (and
    each asyncio task) has its own. Enter the block outside the compiled function.

    Args:
        policy: As in `options={"policy": ...}`; None lifts an enclosing `force`.

    Raises:
        ConfigError: if the policy is not one.
        UnknownMechanismError: if a name is not a mechanism's.
    """
    token = _forced.set(None if policy is None else as_policy(policy))
    try:
        yield
    finally:
        _forced.reset(token)
