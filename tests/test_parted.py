"""Attached modules that are cut in two: policy in one graph, attention in another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import GRID
from modules import POLICY
from modules import Attention
from modules import tokens
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.errors import StrictRewriteError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PROBLEM = "1 attached modules are not in one graph with their attention"


def _broken(heads: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return heads


class Cut(nn.Module):
    """One attention module, cut between its projections and its attention."""

    def __init__(self, edit: Callable[[Tensor], Tensor] | None = _broken) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention()])
        self.edit = edit

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        attended: Tensor = self.blocks[0](x, edit=self.edit)
        return attended


def run(model: nn.Module, **options: Any) -> None:
    compiled = torch.compile(
        model, backend="compiled_sparse", options={"inner": "eager", **options}
    )
    with cs.metadata(grid_thw=GRID):
        compiled(tokens())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_module_that_is_cut_in_two_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = Cut()
    cs.attach(model, POLICY)
    run(model)
    (found,) = warnings_of(caplog)
    assert found.startswith(f"{PROBLEM}: a graph with the start of a module compiled alone and")
    assert "torch._dynamo.config.optimize_ddp = False" in found


def test_strict_raises_about_it_and_explain_notes_it() -> None:
    model = Cut()
    cs.attach(model, POLICY)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(model, strict=True)
    error = caught.value.inner_exception
    assert isinstance(error, StrictRewriteError)
    assert error.problem == PROBLEM
    with cs.metadata(grid_thw=GRID):
        (problem,) = cs.explain(model, tokens()).strict_problems
    assert problem.startswith(PROBLEM)


@pytest.mark.parametrize(
    ("edit", "policy"),
    [
        (None, POLICY),
        (_broken, "dense"),
        (_broken, None),
        (_broken, cs.Policy({"*": POLICY}, dense_first_layers=1)),
    ],
)
def test_modules_in_one_piece_or_without_a_sparse_policy_are_not(
    edit: Any, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Cut(edit)
    cs.attach(model, policy)
    run(model, strict=True)
    assert not warnings_of(caplog)


def test_nor_is_one_that_is_forced_to_be_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = Cut()
    cs.attach(model, POLICY)
    with cs.force("dense"):
        run(model)
    assert PROBLEM not in caplog.text
