"""Which windows are chosen: by hand, and by the published rule written out once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_sparse.calibration.mask_search import MaskSearch
from compiled_sparse.calibration.mask_search import average
from compiled_sparse.calibration.strategy import Strategy
from compiled_sparse.calibration.tuning import parse_candidates
from compiled_sparse.calibration.tuning import select_windows
from compiled_sparse.calibration.tuning import tune
from compiled_sparse.calibration.tuning import tune_cfg
from compiled_sparse.errors import CalibrationError

FULL, LOW, WIDE = (3, 6, 10), (3, 1, 10), (1, 5, 7)

# Two files of three steps, one layer and two heads, as the published program writes them.
FIRST = """{"L2_loss": {"[3, 1, 10]": [[[0.5, 0.5]], [[0.5, 0.25]], [[0.0, 0.75]]],
"[1, 5, 7]": [[[0.25, 0.25]], [[0.75, 0.5]], [[0.5, 0.25]]],
"[3, 6, 10]": [[[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]},
"L1_loss": {"[3, 1, 10]": [[[9, 9]], [[9, 9]], [[9, 9]]],
"[1, 5, 7]": [[[0, 0]], [[0, 0]], [[0, 0]]],
"[3, 6, 10]": [[[0, 0]], [[0, 0]], [[0, 0]]]}}"""
SECOND = """{"L2_loss": {"[3, 1, 10]": [[[0.5, 0.5]], [[0.25, 0.75]], [[1.0, 0.5]]],
"[1, 5, 7]": [[[0.25, 0.25]], [[0.75, 0.0]], [[0.5, 0.25]]],
"[3, 6, 10]": [[[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]},
"L1_loss": {"[3, 1, 10]": [[[9, 9]], [[9, 9]], [[9, 9]]],
"[1, 5, 7]": [[[0, 0]], [[0, 0]], [[0, 0]]],
"[3, 6, 10]": [[[0, 0]], [[0, 0]], [[0, 0]]]}}"""


def folder(path: Path, *contents: str) -> Path:
    path.mkdir()
    for i, content in enumerate(contents):
        (path / f"mask_search_{i}.json").write_text(content)
    return path


def test_the_windows_of_one_file_are_those_chosen_by_hand(tmp_path: Path) -> None:
    strategy = tune(folder(tmp_path / "a", FIRST), full_window=FULL, dense_first_steps=1)
    # Step 1: 0.5 < 0.75 and 0.25 < 0.5. Step 2: 0.0 < 0.5 and 0.75 > 0.25.
    assert strategy.windows == (((FULL, FULL),), ((LOW, LOW),), ((LOW, WIDE),))


def test_the_windows_of_two_files_are_those_chosen_by_hand(tmp_path: Path) -> None:
    both = folder(tmp_path / "a", FIRST, SECOND)
    # Step 0: 0.5 > 0.25 twice. Step 1: 0.375 < 0.75 and 0.5 > 0.25. Step 2: 0.5 and 0.5 are equal,
    # so the first; 0.625 > 0.25.
    chosen = (((WIDE, WIDE),), ((LOW, WIDE),), ((LOW, WIDE),))
    assert tune(both, full_window=FULL, dense_first_steps=0).windows == chosen
    turned = tune(both, full_window=FULL, dense_first_steps=0, candidates=(WIDE, LOW, FULL))
    assert turned.windows == (*chosen[:2], ((WIDE, WIDE),))
    assert tune(both, full_window=FULL, dense_first_steps=0, num_steps=2).windows == chosen[:2]
    only = tune(both, full_window=FULL, dense_first_steps=2, candidates=[LOW])
    assert only.windows == (((FULL, FULL),), ((FULL, FULL),), ((LOW, LOW),))


def test_by_default_twelve_steps_are_dense(tmp_path: Path) -> None:
    losses = {LOW: [[[0.1]]] * 14}
    search = MaskSearch(l2_loss=losses, l1_loss=losses)
    chosen = [layers[0][0] for layers in select_windows(search, full_window=FULL).windows]
    assert chosen == [FULL] * 12 + [LOW] * 2
    search.save(tmp_path, "cat")
    assert tune(tmp_path, full_window=FULL) == select_windows(search, full_window=FULL)
    assert tune_cfg(tmp_path, tmp_path, full_window=FULL) == tune(tmp_path, full_window=FULL)


def test_with_guidance_each_file_has_the_same_weight(tmp_path: Path) -> None:
    def content(low: float, wide: float) -> str:
        losses = {"[3, 1, 10]": [[[low]]], "[1, 5, 7]": [[[wide]]]}
        return json.dumps({"L2_loss": losses, "L1_loss": losses})

    positive = folder(tmp_path / "positive", *3 * [content(0.5, 0.25)])
    negative = folder(tmp_path / "negative", content(0.0, 0.5))
    # Low 1.5 of four files, wide 1.25; with equal weight of the folders low 0.25, wide 0.375.
    strategy = tune_cfg(positive, negative, full_window=FULL, dense_first_steps=0)
    assert strategy.windows == (((WIDE,),),)
    assert tune(negative, full_window=FULL, dense_first_steps=0).windows == (((LOW,),),)


def test_the_full_window_is_the_argument_wherever_it_stands() -> None:
    losses = {FULL: [[[0.0]]], LOW: [[[0.5]]], WIDE: [[[0.25]]]}
    search = MaskSearch(l2_loss=losses, l1_loss=losses)
    assert select_windows(search, full_window=FULL, dense_first_steps=0).windows == (((WIDE,),),)
    assert select_windows(search, full_window=WIDE, dense_first_steps=0).windows == (((FULL,),),)
    other = select_windows(search, full_window=(5, 6, 10), dense_first_steps=1)
    assert other.windows == ((((5, 6, 10),),),)


@pytest.mark.parametrize("call", [tune, lambda folder, **given: tune_cfg(folder, folder, **given)])
def test_a_strategy_is_saved_under_the_published_name(tmp_path: Path, call: Any) -> None:
    searches = folder(tmp_path / "a", FIRST, SECOND)
    for target in (tmp_path / "made" / "strategies", searches):
        strategy = call(searches, full_window=FULL, dense_first_steps=1, save_directory=target)
        saved = target / "mask_strategy_s1.json"
        assert Strategy.from_published(saved, steps=3, layers=1, heads=2) == strategy
    # The one among the searches is none of them.
    assert call(searches, full_window=FULL, dense_first_steps=1) == strategy


def published_selection(
    results: list[dict[str, Any]], masks: list[list[int]], skip: int, sizes: tuple[int, int, int]
) -> dict[str, list[int]]:
    """The published rule, step by step: average by mask, then the argmin without the last mask."""
    sums = {
        str(mask): [
            [
                [sum(r["L2_loss"][str(mask)][t][i][h] for r in results) for h in range(sizes[2])]
                for i in range(sizes[1])
            ]
            for t in range(sizes[0])
        ]
        for mask in masks
    }
    chosen = {}
    for t in range(sizes[0]):
        for i in range(sizes[1]):
            for h in range(sizes[2]):
                best = masks[-1]
                if t >= skip:
                    least = None
                    for mask in masks[:-1]:
                        loss = sums[str(mask)][t][i][h]
                        if least is None or loss < least:
                            least, best = loss, mask
                chosen[f"{t}_{i}_{h}"] = best
    return chosen


@st.composite
def published_results(draw: st.DrawFn) -> tuple[list[dict[str, Any]], tuple[int, int, int]]:
    """Files of few different whole losses, so that many are equal and all sums are exact."""
    sizes = draw(st.tuples(*3 * [st.integers(1, 3)]))
    choose = draw(st.randoms(use_true_random=False))

    def table() -> Any:
        return [
            [[choose.randrange(4) for _ in range(sizes[2])] for _ in range(sizes[1])]
            for _ in range(sizes[0])
        ]

    masks = [list(window) for window in (LOW, WIDE, (3, 3, 3), FULL)]
    files = [
        {norm: {str(mask): table() for mask in masks} for norm in ("L2_loss", "L1_loss")}
        for _ in range(draw(st.integers(1, 3)))
    ]
    return files, sizes


@given(found=published_results(), skip=st.integers(0, 3))
def test_the_selection_is_the_published_one(
    found: tuple[list[dict[str, Any]], tuple[int, int, int]], skip: int
) -> None:
    files, sizes = found
    masks = [list(window) for window in (LOW, WIDE, (3, 3, 3), FULL)]
    strategy = select_windows(
        average(list(map(MaskSearch.from_published, files))),
        full_window=FULL,
        dense_first_steps=skip,
    )
    assert strategy.to_published() == published_selection(files, masks, skip, sizes)


@pytest.mark.parametrize(
    "steps",
    [
        {"num_steps": 0},
        {"num_steps": 4},
        {"num_steps": 1.0},
        {"dense_first_steps": -1},
        {"dense_first_steps": None},
    ],
    ids=str,
)
def test_numbers_of_steps_are_checked(tmp_path: Path, steps: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="number of steps is out of range"):
        tune(folder(tmp_path / "a", FIRST), full_window=FULL, **steps)


def test_windows_are_checked(tmp_path: Path) -> None:
    searches = folder(tmp_path / "a", FIRST)
    with pytest.raises(CalibrationError, match="full_window is not made of three"):
        tune(searches, full_window=(3, 6))
    with pytest.raises(CalibrationError, match="no window to choose from"):
        tune(searches, full_window=FULL, candidates=[FULL])
    with pytest.raises(CalibrationError, match="was not searched"):
        tune(searches, full_window=FULL, candidates=[(9, 9, 9)])


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    searches = folder(tmp_path / "a", FIRST, SECOND.replace("0.75, 0.0", "0.75, NaN"))
    with pytest.raises(CalibrationError) as caught:
        tune(searches, full_window=FULL)
    assert caught.value.got == (
        f"{searches / 'mask_search_1.json'}: L2_loss of [1, 5, 7] at step 1, layer 0, head 1 is nan"
    )


def test_candidates_are_parsed_as_the_published_command_writes_them() -> None:
    written = ["3, 1, 10", "1, 5, 7", "3,3,3", " 1 , 6 , 5 "]
    assert parse_candidates(written) == ((3, 1, 10), (1, 5, 7), (3, 3, 3), (1, 6, 5))


@pytest.mark.parametrize(
    "text",
    ["3 1 10", "3, 1", "3, 1, 10,", "3, 1, 10, 1", "3, -1, 10", "0, 1, 1", "[3, 1, 10]", "a"],
)
def test_a_candidate_that_is_anything_else_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        parse_candidates(["1, 1, 1", text])
    assert caught.value.got == repr(text)


def test_candidates_are_a_list_of_different_ones() -> None:
    for texts in ([], "3, 1, 10", ["3, 1, 10", "1, 1, 1", "3,1,10"]):
        with pytest.raises(CalibrationError, match="not a list of candidate windows"):
            parse_candidates(texts)
