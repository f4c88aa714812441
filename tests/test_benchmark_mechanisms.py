"""The table of mechanisms: what its records hold, at a size that takes no time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import compiled_sparse as cs
from benchmarks import mechanisms
from benchmarks import timing
from benchmarks.mechanisms import Case
from compiled_sparse.block_lists import BlockLists
from compiled_sparse.flex import has_full_blocks
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density

GRID = (4, 8, 8)
STA = cs.STA(window_thw=(1, 3, 1), tile_thw=(2, 2, 4))
CASES = {
    "STA": (Case(STA), sta_density(BlockLayout(GRID, (2, 2, 4)), STA.windows)),
    "VSA": (Case(cs.VSA(sparsity=0.5, tile_thw=(2, 4, 4)), gate=True), 0.5),
    "SageSLA": (Case(cs.SageSLA(topk_ratio=0.25), projection=True, trains=False), 0.25),
}


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes time: compilation, and warming up."""
    quick = partial(timing.interleaved_medians, warm_up_seconds=0.0)
    for module in (timing, mechanisms):
        monkeypatch.setattr(module, "interleaved_medians", quick)

    def uncompiled(function: Callable[..., Any], **options: object) -> Callable[..., Any]:
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(mechanisms, "_flex", lambda lists: mechanisms._dense)


@pytest.mark.parametrize(("case", "density"), CASES.values(), ids=CASES)
def test_a_record_holds_density_error_and_both_directions(
    untimed: None, case: Case, density: float
) -> None:
    record = mechanisms.measure("a name", case, GRID, 1)
    assert record["case"] == "a name"
    assert record["config"] == case.config.describe()
    assert record["density"] == pytest.approx(density)
    assert record["limit"] == pytest.approx(1 / density)
    assert ("backward" in record) == case.trains
    for direction, names in (
        ("forward", {"dense", "compiled", "flex_attention"}),
        ("backward", {"dense", "compiled"}),
    ):
        if direction in record:
            assert record[direction]["fraction_of_limit"].keys() == names
            assert record[direction]["speed_up_over_dense"]["dense"] == 1.0


def test_the_error_is_that_of_the_reference_against_dense_attention(untimed: None) -> None:
    case = CASES["VSA"][0]
    q, k, v = mechanisms._inputs(GRID)[:3]
    dense = cs.reference.attention(q, k, v, cs.Dense())
    sparse = cs.reference.attention(q, k, v, case.config, grid_thw=GRID)
    expected = float((sparse - dense).norm() / dense.norm())
    assert expected > 0.1
    assert mechanisms.measure("", case, GRID, 1)["relative_error"] == pytest.approx(expected)


@pytest.mark.parametrize("case", mechanisms.CASES.values(), ids=mechanisms.CASES)
def test_every_case_leaves_out_about_nine_tenths_in_full_blocks(case: Case) -> None:
    q, k = mechanisms._inputs(mechanisms.GRID)[:2]
    lists = mechanisms.block_lists(case.config, q, k, grid_thw=mechanisms.GRID)
    assert lists is not None
    assert not isinstance(lists, BlockLists) or has_full_blocks(lists)
    most = 0.25 if case is mechanisms.CASES["VMoBA, temporal"] else 0.12
    assert 0.09 < lists.density <= most


def test_a_backward_is_timed_of_functions_that_leave_inputs_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def call_each(functions: Any, rounds: int) -> dict[str, float]:
        ran.extend((name, [g is None for g in each()]) for name, each in functions.items())
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(timing, "interleaved_medians", call_each)
    functions = {"one": lambda a, b: 2 * a, "both": lambda a, b: a * b}
    timing.backward_medians(functions, [torch.ones(2), torch.ones(2)], 1)
    assert ran == [("one", [False, True]), ("both", [False, False])]
