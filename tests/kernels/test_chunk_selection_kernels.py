"""The GPU kernels that select chunks for each query, interpreted, against the rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from selecting import BASE
from selecting import QUARTERS
from selecting import SIZES
from selecting import Case
from selecting import Inputs
from selecting import expected
from selecting import make
from torch import Tensor

from compiled_sparse.ops import gpu_selection
from compiled_sparse.ops.bit_masks import unpack_bits

pytestmark = pytest.mark.usefixtures("poisoned_memory", "gpu_kernels_on_cpu")

HALF_AND_SINGLE = {name: case for name, case in SIZES.items() if case.dtype != torch.float64}
RULES = [
    *({"mode": "topk", "count": count} for count in (0, 1, 3, 1000)),
    *({"mode": "threshold", "threshold": share} for share in (0.0, 0.25, 1.0, 1.5)),
]
FAST = (("text", RULES[2]), ("ties", RULES[2]), ("ties", RULES[5]), ("two chunks", RULES[5]))


def cases() -> list[Any]:
    """Every case under every rule; the interpreter takes seconds for most."""
    return [
        pytest.param(
            case, rule, marks=() if (name, rule) in FAST else pytest.mark.slow, id=f"{name} {rule}"
        )
        for name, case in HALF_AND_SINGLE.items()
        for rule in RULES
    ]


def select(x: Inputs) -> Tensor:
    return unpack_bits(x.call(gpu_selection.select_per_query), x.q.shape[2])


@pytest.mark.parametrize(("case", "rule"), cases())
def test_the_selection_follows_the_rules(case: Case, rule: dict[str, float]) -> None:
    x = make(replace(case, **rule))  # type: ignore[arg-type]
    assert torch.equal(select(x), expected(x))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULES[2], RULES[5]], ids=str)
def test_heads_at_a_time_do_not_matter(
    rule: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(replace(QUARTERS, **rule))  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_selection, "_MAX_GATES", 1)
    assert torch.equal(select(x), expected(x))


@pytest.mark.parametrize("rule", [RULES[2], RULES[5]], ids=str)
def test_gates_that_are_no_numbers_do_no_harm(rule: dict[str, float]) -> None:
    x = make(replace(BASE, **rule))  # type: ignore[arg-type]
    x.q[0, 0, 3] = float("nan")
    found, wanted = select(x), expected(replace(x, q=x.q.nan_to_num()))
    others = torch.arange(x.q.shape[2]) != 3
    assert torch.equal(found[..., others], wanted[..., others])
    assert found[0, 0, int(x.own[3]), 3]
