"""How the wording of errors is checked; see `test_messages.py`."""

from __future__ import annotations

import ast
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import compiled_sparse as cs
from compiled_sparse.errors import CompiledSparseError

PACKAGE = Path(cs.__file__).parent


class Case(NamedTuple):
    """How to provoke an error, and words of each of its parts."""

    error: type[CompiledSparseError]
    problem: str
    got: str
    expected: str
    next_step: str
    provoke: Callable[[], object]


def assert_wording(case: Case) -> None:
    """Check class and parts of an error, and that its text shows them all."""
    with pytest.raises(CompiledSparseError) as caught:
        case.provoke()
    error = caught.value
    assert type(error) is case.error
    assert case.problem in error.problem
    assert case.got in error.got
    assert case.expected in error.expected
    assert case.next_step in error.next_step
    assert str(error).splitlines() == [
        error.problem,
        f"  got:      {error.got}",
        f"  expected: {error.expected}",
        f"  next:     {error.next_step}",
    ]


def raise_statements(modules: Iterable[str]) -> set[tuple[str, int]]:
    """Return module and line of every raise statement."""
    found = set()
    for module in modules:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        lines = (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise))
        found |= {(module, line) for line in lines}
    return found


def raised_at(cases: Iterable[Case]) -> set[tuple[str, int]]:
    """Return module and line of the raise statements that the cases reach."""
    reached = set()
    for case in cases:
        with pytest.raises(CompiledSparseError) as caught:
            case.provoke()
        entry = caught.traceback[-1]
        module = Path(entry.path).relative_to(PACKAGE).with_suffix("").as_posix()
        reached.add((module, entry.lineno + 1))
    return reached
