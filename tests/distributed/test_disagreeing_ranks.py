"""Ranks of a compiled model that differ, fail or die: every other one ends, and says why."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from divided import Model
from processes import Outcome
from processes import run_processes
from processes import values
from torch import Tensor
from torch import distributed

import compiled_sparse as cs
from compiled_sparse.errors import DistributedError

STA = cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 2))
GRID = (4, 6, 5)
SOON_S = 120.0
"""Long before any timeout, even where both processes share a busy core."""


def _compiled(policy: Any = STA, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Model(heads=4, key_heads=4, head_dim=8)
    options = {"policy": policy, "inner": "eager", **options}
    return torch.compile(model, backend="compiled_sparse", options=options)


def _call(compiled: Any, grid: tuple[int, ...] = GRID) -> Tensor:
    torch.manual_seed(distributed.get_rank())
    with torch.no_grad(), cs.metadata(grid_thw=grid, mesh=distributed.group.WORLD):
        return compiled(torch.randn(1, 60, 24))


def _disagreement(*calls: tuple[tuple[int, ...], ...]) -> tuple[str, str]:
    """Make calls over grids by rank; the last one must end in an error."""
    compiled, rank = _compiled(), distributed.get_rank()
    *before, last = calls
    for grids in before:
        assert _call(compiled, grids[rank]).isfinite().all()
    with pytest.raises(DistributedError) as caught:
        _call(compiled, last[rank])
    return caught.value.problem, caught.value.got


DIFFER = "the ranks disagree about the first run of a compiled graph"


def test_another_policy_by_the_environment_of_one_rank_is_told_by_all() -> None:
    environments = {1: {"COMPILED_SPARSE_BACKEND": "dense"}}
    found = values(2, _disagreement, (GRID, GRID), environments=environments, limit_s=SOON_S)
    for problem, got in found:
        assert problem == DIFFER
        assert "policy: " in got
        assert "attention calls: " in got
        assert "sta:window_thw=1x3x3" in got


def test_another_grid_of_as_many_tokens_is_told_by_all_also_after_calls_that_went_well() -> None:
    calls = [(GRID, GRID), (GRID, GRID), ((2, 6, 10), (6, 2, 10))]
    for problem, got in values(2, _disagreement, *calls, limit_s=SOON_S):
        assert problem == DIFFER
        assert "grid (2, 6, 10)" in got
        assert "grid (6, 2, 10)" in got


def _failing_to_compile() -> str:
    """Rank 1 cannot make its call sparse, which it is strict about."""
    table = cs.STA(window_thw=((1, 3, 3),) * 3, tile_thw=(2, 3, 2))
    is_wrong = distributed.get_rank() == 1
    _call(_compiled(table if is_wrong else STA, strict=True))
    return "no error"


def test_a_rank_that_fails_to_compile_is_heard_at_once() -> None:
    first, second = run_processes(2, _failing_to_compile, limit_s=SOON_S)
    assert "StrictRewriteError: 2 attention calls" in second.error
    assert "rank 1 (global 1) failed before the first run of a compiled graph" in first.error
    assert "DistributedError" in first.error
    assert "heads_mismatch" in first.error


def _call_three_times(compiled: Any) -> None:
    """What the other rank has sent before it ended may still come."""
    for _ in range(3):
        _call(compiled)


def _killed_between_calls() -> tuple[str, float]:
    compiled = _compiled()
    _call(compiled)
    distributed.barrier()
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DistributedError) as caught:
        _call_three_times(compiled)
    assert "start all ranks again" in caught.value.next_step
    return caught.value.problem, time.monotonic() - started


def test_a_rank_that_is_killed_between_calls_is_told_by_the_other() -> None:
    first, second = run_processes(2, _killed_between_calls, limit_s=SOON_S, collective_s=20.0)
    assert second.exit_code == -signal.SIGKILL
    assert not first.error, first.error
    problem, seconds = first.value
    assert problem.startswith("another rank of the group ")
    assert seconds < 30


WINDOWS = ((99, 99, 99), (99, 99, 99), (1, 1, 1), (1, 1, 1))
"""Exact for the heads of rank 0, far from it for those of rank 1."""


def _guarded(on_failure: str) -> dict[str, Any]:
    guard = {"calls": 1, "rows": 30, "max_relative_error": 1e-3, "on_failure": on_failure}
    policy = cs.STA(window_thw=WINDOWS, tile_thw=(2, 3, 2))
    compiled = _compiled(policy, guard=guard)
    outs = [_call(compiled) for _ in range(2)]
    dense = _call(_compiled("dense"))
    sparse = _call(_compiled(policy))
    return {"outs": outs, "dense": dense, "sparse": sparse}


def test_the_guard_judges_alike_on_every_rank_where_the_heads_of_one_err() -> None:
    for found in values(2, _guarded, "dense", limit_s=SOON_S):
        assert (found["sparse"] - found["dense"]).abs().max() > 1e-3
        for out in found["outs"]:
            torch.testing.assert_close(out, found["dense"])


@pytest.mark.slow
def test_a_guard_that_raises_does_so_on_every_rank() -> None:
    found: list[Outcome] = run_processes(2, _guarded, "raise", limit_s=SOON_S)
    said = [each.error.strip().partition("GuardError: ")[2] for each in found]
    assert "2 of 2 sparse calls failed the guard" in said[0]
    assert said[0] == said[1]
