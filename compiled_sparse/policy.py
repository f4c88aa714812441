"""Policies: which mechanism for which attention call.

A policy can be written as a config, a mechanism's name, a spec string, a mapping from glob patterns
on module paths to any of these, a `Policy`, or the path of a policy's JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compiled_sparse.config import FORMAT_VERSION
from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import check_version
from compiled_sparse.config import is_count
from compiled_sparse.config import parse_json_object
from compiled_sparse.config import parse_spec
from compiled_sparse.config import read_text
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.quality import LEVELS

CATCH_ALL = "*"
KINDS = ("self", "joint")
_COUNTS = ("dense_first_steps", "dense_last_steps", "dense_first_layers", "dense_last_layers")


@dataclass(frozen=True)
class StepSchedule:
    """Steps at the ends of a denoising run that stay dense.

    Args:
        first: How many steps at the start.
        last: How many steps at the end.
    """

    first: int = 0
    last: int = 0

    def is_dense(self, step: int | None, num_steps: int | None) -> bool:
        """Whether a step is dense; an unknown step counts as the first, and never as the last."""
        step = step or 0
        return step < self.first or (num_steps is not None and step >= num_steps - self.last)

    def is_decidable(self, step: int | None, num_steps: int | None) -> bool:
        """Whether step and number of steps say all that `is_dense` asks."""
        return step is not None and (num_steps is not None or not self.last)


@dataclass(frozen=True)
class Policy:
    """Ordered rules from module-path globs to mechanism configs, and what stays dense for a while.

    The first matching rule wins; a call no rule matches stays dense. A glob may be prefixed by the
    kind of call: `self:blocks.*` is video alone, `joint:*` is video and text in one sequence.

    Args:
        rules: Mapping (or pairs) from a glob such as `blocks.*.attn1` to a config, a name or a spec
            string.
        dense_first_steps: Denoising steps at the start that stay dense; see `cs.metadata(step=)`.
        dense_last_steps: Denoising steps at the end that stay dense.
        dense_first_layers: Video attention layers at the start of the model that stay dense.
        dense_last_layers: Video attention layers at its end that stay dense.

    Raises:
        ConfigError: if there is no rule, or one that can never be reached: behind the catch-all
            `*`, or with a glob that was there before; if a prefix is no kind, or a number of steps
            or layers is no count.
    """

    rules: tuple[tuple[str, MechanismConfig], ...]
    dense_first_steps: int
    dense_last_steps: int
    dense_first_layers: int
    dense_last_layers: int

    def __init__(
        self,
        rules: Mapping[str, Any] | tuple[tuple[str, Any], ...],
        dense_first_steps: int = 0,
        dense_last_steps: int = 0,
        dense_first_layers: int = 0,
        dense_last_layers: int = 0,
    ) -> None:
        resolved = tuple((str(glob), _as_config(value)) for glob, value in _as_pairs(rules))
        counts = (dense_first_steps, dense_last_steps, dense_first_layers, dense_last_layers)
        object.__setattr__(self, "rules", resolved)
        for name, count in zip(_COUNTS, counts, strict=True):
            object.__setattr__(self, name, count)
        _check_globs([glob for glob, _ in resolved])
        _check_counts(dict(zip(_COUNTS, counts, strict=True)))

    def match(self, path: str, kind: str = "") -> tuple[str, MechanismConfig] | None:
        """Return the first rule that matches a module path and a kind of call, or None."""
        for glob, config in self.rules:
            wanted, pattern = _split_kind(glob)
            if wanted in ("", kind) and (pattern == CATCH_ALL or fnmatchcase(path, pattern)):
                return glob, config
        return None

    @property
    def steps(self) -> StepSchedule | None:
        """Which steps stay dense, or None if none does."""
        schedule = StepSchedule(self.dense_first_steps, self.dense_last_steps)
        return None if schedule == StepSchedule() else schedule

    @property
    def step_schedules(self) -> frozenset[StepSchedule]:
        """Which steps stay dense, by the policy's word and by that of each of its configs."""
        own = {StepSchedule(first=config.dense_first_steps) for _, config in self.rules}
        return frozenset(own | {self.steps or StepSchedule()}) - {StepSchedule()}

    @property
    def is_automatic(self) -> bool:
        """Whether no rule names a mechanism."""
        return all(isinstance(config, Auto) for _, config in self.rules)

    @property
    def sparse_globs(self) -> tuple[str, ...]:
        """Globs of the rules that may make something sparse."""
        return tuple(glob for glob, config in self.rules if not isinstance(config, Dense))

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layers stay dense."""
        return bool(self.dense_first_layers or self.dense_last_layers)

    def describe_schedule(self) -> str:
        """Return the schedule in words, e.g. `dense at steps 0-11, layers 0-1`; empty if none."""
        parts = [
            *_ends("step", self.dense_first_steps, self.dense_last_steps),
            *_ends("layer", self.dense_first_layers, self.dense_last_layers),
        ]
        return "dense at " + ", ".join(parts) if parts else ""

    def to_json(self) -> str:
        """Return the policy as a JSON document with a version."""
        rules = {glob: config.to_dict() for glob, config in self.rules}
        policy = {"rules": rules, **{name: getattr(self, name) for name in _COUNTS}}
        return json.dumps({"version": FORMAT_VERSION, "policy": policy}, indent=2)

    @staticmethod
    def from_json(text: str) -> Policy:
        """Build a policy from what `to_json` returned; documents of older releases have no counts.

        Raises:
            ConfigFormatError: if the document is not a policy of a known version.
            ConfigError: if a rule or a count is out of range.
        """
        document = parse_json_object(text)
        check_version(document)
        policy = document.get("policy")
        rules = policy.get("rules") if isinstance(policy, dict) else None
        if not isinstance(rules, dict) or not all(isinstance(r, dict) for r in rules.values()):
            raise ConfigFormatError(
                "JSON document holds no policy",
                got=f"keys {sorted(document)}",
                expected='{"version": 2, "policy": {"rules": {"<glob>": {...}}}}',
                next_step="write the file again with Policy.to_json()",
            )
        counts = {name: value for name, value in document["policy"].items() if name != "rules"}
        if unknown := sorted(set(counts) - set(_COUNTS)):
            raise ConfigFormatError(
                "unknown field of a policy",
                got=", ".join(unknown),
                expected="rules, " + ", ".join(_COUNTS),
                next_step="correct the field name, or upgrade if the file is of a newer version",
            )
        return Policy(
            {glob: MechanismConfig.from_dict(rule) for glob, rule in rules.items()}, **counts
        )


def _split_kind(glob: str) -> tuple[str, str]:
    kind, colon, pattern = glob.partition(":")
    return (kind, pattern) if colon else ("", glob)


def _check_globs(globs: list[str]) -> None:
    repeated = len(set(globs)) != len(globs)
    if not globs or repeated or (CATCH_ALL in globs and globs[-1] != CATCH_ALL):
        raise ConfigError(
            "policy rules are empty or can never be reached",
            got=repr(globs),
            expected='at least one rule, each glob once, "*" last: the first match wins',
            next_step='remove repeated globs and put the rule "*" at the end',
        )
    for glob in globs:
        if ":" in glob and _split_kind(glob)[0] not in KINDS:
            raise ConfigError(
                "a glob is prefixed by something that is no kind of call",
                got=repr(glob),
                expected="a prefix among " + ", ".join(f"{kind}:" for kind in KINDS) + " or none",
                next_step='write "joint:*" for video with text, "self:*" for video alone',
            )


def _check_counts(counts: Mapping[str, Any]) -> None:
    for name, count in counts.items():
        if not is_count(count, least=0):
            raise ConfigError(
                f"Policy.{name} is not a count",
                got=repr(count),
                expected="an integer of at least 0",
                next_step=f"pass {name}=0 to keep none dense",
            )


def _ends(unit: str, first: int, last: int) -> list[str]:
    head = f"{unit}s 0-{first - 1}" if first > 1 else f"{unit} 0"
    tail = f"the last {last} {unit}s" if last > 1 else f"the last {unit}"
    return ([head] if first else []) + ([tail] if last else [])


PolicyLike = Policy | MechanismConfig | str | Mapping[str, Any] | Path | None


def as_policy(value: PolicyLike) -> Policy:
    """Turn any accepted form of a policy into a `Policy`.

    Args:
        value: A config, a name, a spec string, the name of a quality level, a mapping from globs, a
            `Policy`, the path of a JSON file, or None for `auto`.

    Returns:
        The policy.

    Raises:
        ConfigError: if the value is of another type, or holds a bad rule.
        ConfigFormatError: if a file or spec string cannot be read as a policy.
        UnknownMechanismError: if a name is not a mechanism's.
    """
    if value is None:
        return Policy({CATCH_ALL: Auto()})
    if isinstance(value, Policy):
        return value
    if isinstance(value, Mapping):
        return Policy(value)
    if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".json")):
        return Policy.from_json(read_text(Path(value), "policy", "written by Policy.to_json()"))
    if isinstance(value, str) and value.strip().lower() in LEVELS:
        return quality(value)
    return Policy({CATCH_ALL: value})


def quality(name: str) -> Policy:
    """Return the policy of a quality level, to look at, to change or to pass on.

    Args:
        name: "exact" (every block: dense results by the sparse path), "careful", "balanced" or
            "fast"; the numbers are in docs/policy.md.

    Raises:
        ConfigError: if there is no such level.
    """
    level = LEVELS.get(name.strip().lower())
    if level is None:
        raise ConfigError(
            "unknown quality level",
            got=repr(name),
            expected="one of " + ", ".join(LEVELS),
            next_step='pass "balanced", for instance',
        )
    steps, layers = level.dense_first_steps, level.dense_first_layers
    return Policy({CATCH_ALL: level.config}, dense_first_steps=steps, dense_first_layers=layers)


def _as_pairs(rules: Any) -> tuple[tuple[Any, Any], ...]:
    if isinstance(rules, Mapping):
        return tuple(rules.items())
    is_sequence = isinstance(rules, list | tuple)
    if not is_sequence or not all(isinstance(p, list | tuple) and len(p) == 2 for p in rules):
        raise ConfigError(
            "policy rules are not a mapping",
            got=repr(rules),
            expected="a mapping, or pairs, from globs to configs or spec strings",
            next_step='write Policy({"*": "sta"})',
        )
    return tuple(rules)


def _as_config(value: Any) -> MechanismConfig:
    if isinstance(value, MechanismConfig):
        return value
    if isinstance(value, str):
        return parse_spec(value)
    raise ConfigError(
        "a policy rule is neither a config nor a spec string",
        got=repr(value),
        expected="a config such as STA(...), a name, or a spec string",
        next_step='write {"blocks.*.attn1": STA(window_thw=(3, 3, 3)), "*": "dense"}',
    )
