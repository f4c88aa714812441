"""`Guard`: compare the first sparse calls with dense attention, and say loudly what was found."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import GuardError

logger = logging.getLogger("compiled_sparse")

ON_FAILURE = ("warn", "dense", "raise")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What to check on the first calls of each compiled variant.

    Args:
        calls: How many calls are checked.
        rows: How many query positions, spread over the sequence, are compared with dense attention.
        max_relative_error: Largest L2 error of these rows, relative to dense attention's L2 norm.
        on_failure: "warn" goes on, "dense" returns and keeps dense attention for the graph,
            "raise" raises `GuardError`. Each says what was found.

    Raises:
        ConfigError: if a number is out of range or the action is not one of these.
    """

    calls: int = 2
    rows: int = 64
    max_relative_error: float = 0.5
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        error: Any = self.max_relative_error
        counts: tuple[Any, ...] = (self.calls, self.rows)
        numbers = isinstance(error, int | float) and error >= 0.0
        numbers = numbers and all(isinstance(each, int) and each >= 1 for each in counts)
        if not numbers or self.on_failure not in ON_FAILURE:
            raise ConfigError(
                "Guard has a value out of range",
                got=repr(self),
                expected="calls >= 1, rows >= 1, max_relative_error >= 0, on_failure among "
                + ", ".join(ON_FAILURE),
                next_step='pass Guard(calls=2, rows=64, on_failure="warn"), for instance',
            )


def as_guard(value: Any) -> Guard | None:
    """Turn what `options["guard"]` may hold into a `Guard`, or None for no guard.

    Args:
        value: A `Guard`, a mapping of its fields, True for the defaults, None or False for none.

    Raises:
        ConfigError: if the value is of another type, or holds an unknown field or a bad value.
    """
    if value is None or value is False:
        return None
    if isinstance(value, Guard):
        return value
    known = {field.name for field in dataclasses.fields(Guard)}
    if value is True or (isinstance(value, Mapping) and set(value) <= known):
        return Guard(**({} if value is True else dict(value)))
    raise ConfigError(
        "options['guard'] is no guard",
        got=repr(value),
        expected="True, a Guard, or a mapping with fields among " + ", ".join(sorted(known)),
        next_step='write {"guard": {"calls": 2, "rows": 64}}',
    )


@dataclass(frozen=True)
class Finding:
    """What the check of one sparse call found.

    Args:
        path: The module that made the call.
        num_bad: Elements of the output that are NaN or infinite.
        relative_error: L2 error of the sampled rows relative to dense attention's norm; NaN where
            dense attention itself is not finite.
        dense_is_finite: Whether dense attention on the same rows is finite.
    """

    path: str
    num_bad: int
    relative_error: float
    dense_is_finite: bool

    def is_failure(self, guard: Guard) -> bool:
        """Whether the call is worse than the guard allows."""
        too_far = self.dense_is_finite and not self.relative_error <= guard.max_relative_error
        return self.num_bad > 0 or too_far

    def __str__(self) -> str:
        """Return the finding in words."""
        found = f"{self.path or 'an attention call'}: relative error {self.relative_error:.3g}"
        if self.num_bad:
            found += f", {self.num_bad} values NaN or infinite"
        return found + ("" if self.dense_is_finite else ", dense attention is not finite either")


def read_findings(paths: Sequence[str], statistics: Sequence[Tensor]) -> list[Finding]:
    """Read what `compiled_sparse::guard_statistics` measured at each call.

    Args:
        paths: Module path of each call.
        statistics: Per call a float tensor [4]: bad elements, squared error, squared norm of dense
            attention, bad elements of dense attention.
    """
    findings = []
    for path, numbers in zip(paths, torch.stack(list(statistics)).tolist(), strict=True):
        bad, error, norm, dense_bad = numbers
        finite = dense_bad == 0
        relative = math.sqrt(error / max(norm, 1e-30)) if finite else math.nan
        findings.append(Finding(path, int(bad), relative, finite))
    return findings


def report_findings(guard: Guard, findings: Sequence[Finding]) -> bool:
    """Say what was found.

    Returns:
        Whether the graph should be dense from now on.

    Raises:
        GuardError: if a call failed and the guard is to raise.
    """
    failures = [finding for finding in findings if finding.is_failure(guard)]
    if not failures:
        worst = max(findings, key=lambda finding: finding.relative_error)
        logger.info("guard: %d sparse calls checked, worst %s", len(findings), worst)
        return False
    listed = "; ".join(map(str, failures))
    if guard.on_failure == "raise":
        raise GuardError(
            f"{len(failures)} of {len(findings)} sparse calls failed the guard",
            got=listed,
            expected=f"finite outputs, relative error up to {guard.max_relative_error}",
            next_step='use a wider window, a more careful quality level, or on_failure="dense"',
        )
    becomes_dense = guard.on_failure == "dense"
    logger.warning(
        "guard: %d of %d sparse calls failed (relative error up to %s is allowed): %s. %s",
        len(failures),
        len(findings),
        guard.max_relative_error,
        listed,
        "This graph is dense from now on." if becomes_dense else "They stay sparse.",
    )
    return becomes_dense
