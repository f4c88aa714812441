"""The override from outside the program: `COMPILED_SPARSE_BACKEND`.

Read at every call by the backend's own code, never inside a traced function.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.errors import UnknownMechanismError
from compiled_sparse.policy import Policy
from compiled_sparse.policy import as_policy
from compiled_sparse.quality import LEVELS

VARIABLE = "COMPILED_SPARSE_BACKEND"

ALIASES = {
    "SLIDING_TILE_ATTN": "sta",
    "VIDEO_SPARSE_ATTN": "vsa",
    "SLA_ATTN": "sla",
    "SAGE_SLA_ATTN": "sage_sla",
    "VMOBA_ATTN": "vmoba",
    "TORCH_SDPA": "dense",
}
"""FastVideo's names of attention backends, and the mechanism each stands for."""


def mechanism_from_name(name: str) -> MechanismConfig:
    """Return the config a name or spec string stands for; FastVideo's names are accepted.

    Args:
        name: Such as `sta`, `sta:window_thw=3x3x3` or `SLIDING_TILE_ATTN`, in any case.

    Raises:
        UnknownMechanismError: if no mechanism of this release has the name.
        ConfigFormatError: if a spec string cannot be read.
    """
    return parse_spec(ALIASES.get(name.strip().upper(), name))


def policy_from_environment() -> Policy | None:
    """Return the policy `COMPILED_SPARSE_BACKEND` names, or None where it is unset or empty.

    Raises:
        UnknownMechanismError: if it names no mechanism.
        ConfigFormatError: if it is a spec string or a file that cannot be read.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return None
    return _parse(value, _changed(value) if value.endswith(".json") else 0)


@lru_cache(maxsize=64)
def _parse(value: str, changed: int = 0) -> Policy:
    is_form_of_policy = value.endswith(".json") or value.lower() in LEVELS
    try:
        return as_policy(value if is_form_of_policy else mechanism_from_name(value))
    except CompiledSparseError as error:
        forms = f", a spec string, a quality level ({', '.join(LEVELS)}), the path of a policy's "
        forms += f"JSON file, or one of {', '.join(ALIASES)}"
        is_unknown = isinstance(error, UnknownMechanismError)
        raise type(error)(
            f"{VARIABLE} is set to something unknown: {error.problem}",
            got=error.got,
            expected=error.expected + (forms if is_unknown else ""),
            next_step=f"correct {VARIABLE}, or unset it",
        ) from None


def _changed(value: str) -> int:
    """When a file was last written: an edited policy file is read again."""
    try:
        return Path(value).stat().st_mtime_ns
    except OSError:
        return 0
