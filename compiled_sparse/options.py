"""What `torch.compile(..., options=...)` may hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compiled_sparse.errors import UnknownOptionError
from compiled_sparse.guard import Guard
from compiled_sparse.guard import as_guard
from compiled_sparse.passes.probe import Probe
from compiled_sparse.policy import Policy
from compiled_sparse.policy import as_policy

INNER_COMPILERS = ("inductor", "aot_eager", "eager")
OWN_OPTIONS = ("policy", "inner", "mode", "strict", "guard")


@dataclass(frozen=True)
class BackendOptions:
    """Checked options of one `torch.compile` call.

    Args:
        policy: Which mechanism for which call.
        inner: Compiler the rewritten graph is handed to.
        inductor: Inductor config patches, `mode` included.
        strict: Raise where a call that should be sparse stays dense.
        guard: What to check on the first calls, if anything.
        probe: What to measure beside dense attention instead of anything else; a calibration's.
    """

    policy: Policy
    inner: str
    inductor: Mapping[str, Any]
    strict: bool
    guard: Guard | None = None
    probe: Probe | None = None

    @property
    def is_automatic(self) -> bool:
        """Whether no mechanism was named at all."""
        return self.policy.is_automatic


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> BackendOptions:
    """Check options and mode.

    Args:
        options: As given to `torch.compile`.
        mode: torch.compile's mode; `options={"mode": ...}` says the same.

    Returns:
        The checked options.

    Raises:
        UnknownOptionError: if a key, the inner compiler or the mode is not known.
        ConfigError: if the policy or the guard is not one.
    """
    given = dict(options or {})
    policy = as_policy(given.pop("policy", None))
    inner = given.pop("inner", "inductor")
    strict = given.pop("strict", False)
    guard = as_guard(given.pop("guard", None))
    probe = given.pop("probe", None)
    mode = given.pop("mode", None) or mode
    if not isinstance(strict, bool):
        raise UnknownOptionError(
            "strict is neither True nor False",
            got=repr(strict),
            expected="True or False",
            next_step='pass options={"strict": True} to raise where a call stays dense',
        )
    if inner not in INNER_COMPILERS:
        raise UnknownOptionError(
            "unknown inner compiler",
            got=repr(inner),
            expected="one of " + ", ".join(INNER_COMPILERS),
            next_step='pass options={"inner": "inductor"}',
        )
    patches = {**_mode_patches(mode), **_inductor_patches(given)}
    return BackendOptions(policy, inner, patches, strict, guard, probe)


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    known = torch._inductor.list_mode_options()
    if mode not in known:
        raise UnknownOptionError(
            "unknown mode",
            got=repr(mode),
            expected="one of " + ", ".join(known),
            next_step="pass one of these, or inductor's own options",
        )
    return dict(known[mode])


def _inductor_patches(given: dict[str, Any]) -> dict[str, Any]:
    known = set(torch._inductor.list_options())
    patches = {key.replace("-", "_"): value for key, value in given.items()}
    unknown = sorted(set(patches) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*OWN_OPTIONS, *known], n=3)
        raise UnknownOptionError(
            "unknown option",
            got=", ".join(unknown),
            expected=", ".join(OWN_OPTIONS) + ", or a name of torch._inductor.config",
            next_step=f"did you mean {' or '.join(near)}?" if near else "remove it",
        )
    return patches
