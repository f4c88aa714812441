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
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import check_version
from compiled_sparse.config import parse_json_object
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError

CATCH_ALL = "*"


@dataclass(frozen=True)
class Policy:
    """Ordered rules from module-path globs to mechanism configs; the first match wins.

    Args:
        rules: Mapping (or pairs) from a glob such as `blocks.*.attn1` to a config, a name or a spec
            string. A call no rule matches stays dense.

    Raises:
        ConfigError: if there is no rule, or one that can never be reached: behind the catch-all
            `*`, or with a glob that was there before.
    """

    rules: tuple[tuple[str, MechanismConfig], ...]

    def __init__(self, rules: Mapping[str, Any] | tuple[tuple[str, Any], ...]) -> None:
        pairs = _as_pairs(rules)
        resolved = tuple((str(glob), _as_config(value)) for glob, value in pairs)
        object.__setattr__(self, "rules", resolved)
        globs = [glob for glob, _ in resolved]
        repeated = len(set(globs)) != len(globs)
        if not globs or repeated or (CATCH_ALL in globs and globs[-1] != CATCH_ALL):
            raise ConfigError(
                "policy rules are empty or can never be reached",
                got=repr(globs),
                expected='at least one rule, each glob once, "*" last: the first match wins',
                next_step='remove repeated globs and put the rule "*" at the end',
            )

    def match(self, path: str) -> tuple[str, MechanismConfig] | None:
        """Return the first rule whose glob matches a module path, or None."""
        for glob, config in self.rules:
            if glob == CATCH_ALL or fnmatchcase(path, glob):
                return glob, config
        return None

    def to_json(self) -> str:
        """Return the policy as a JSON document with a version."""
        rules = {glob: config.to_dict() for glob, config in self.rules}
        return json.dumps({"version": FORMAT_VERSION, "policy": {"rules": rules}}, indent=2)

    @staticmethod
    def from_json(text: str) -> Policy:
        """Build a policy from what `to_json` returned.

        Raises:
            ConfigFormatError: if the document is not a policy of this version.
        """
        document = parse_json_object(text)
        check_version(document)
        policy = document.get("policy")
        rules = policy.get("rules") if isinstance(policy, dict) else None
        if not isinstance(rules, dict) or not all(isinstance(r, dict) for r in rules.values()):
            raise ConfigFormatError(
                "JSON document holds no policy",
                got=f"keys {sorted(document)}",
                expected='{"version": 1, "policy": {"rules": {"<glob>": {...}}}}',
                next_step="write the file again with Policy.to_json()",
            )
        return Policy({glob: MechanismConfig.from_dict(rule) for glob, rule in rules.items()})


PolicyLike = Policy | MechanismConfig | str | Mapping[str, Any] | Path | None


def as_policy(value: PolicyLike) -> Policy:
    """Turn any accepted form of a policy into a `Policy`.

    Args:
        value: A config, a name, a spec string, a mapping from globs, a `Policy`, the path of a
            JSON file, or None for `auto`.

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
        return Policy.from_json(_read(Path(value)))
    return Policy({CATCH_ALL: value})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigFormatError(
            "policy file cannot be read",
            got=f"{path}: {error.strerror}",
            expected="a readable JSON file written by Policy.to_json()",
            next_step="check the path",
        ) from None


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
