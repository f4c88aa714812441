"""Strategies: the published form in both directions, tables, how sparse they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compiled_sparse as cs
from compiled_sparse.calibration.strategy import Strategy
from compiled_sparse.errors import CalibrationError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import table_density

# Two steps, one layer, two heads, as the published program writes it.
PUBLISHED = """{
    "0_0_0": [
        3,
        6,
        10
    ],
    "0_0_1": [
        3,
        6,
        10
    ],
    "1_0_0": [
        3,
        1,
        10
    ],
    "1_0_1": [
        1,
        6,
        5
    ]
}"""
FULL, LOW, EVEN = (3, 6, 10), (3, 1, 10), (1, 6, 5)
STRATEGY = Strategy(windows=(((FULL, FULL),), ((LOW, EVEN),)))


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    """Small strategies, of which some have eleven of something: two digits."""
    steps, layers, heads = (draw(st.sampled_from([1, 2, 3, 11])) for _ in range(3))
    window = st.tuples(*3 * [st.integers(1, 12)])
    palette = draw(st.lists(window, min_size=1, max_size=4))
    choose = draw(st.randoms(use_true_random=False))
    return Strategy(
        windows=tuple(
            tuple(tuple(choose.choice(palette) for _ in range(heads)) for _ in range(layers))
            for _ in range(steps)
        )
    )


def test_a_published_file_is_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "mask_strategy_s1.json", tmp_path / "made" / "ours.json"
    theirs.write_text(PUBLISHED)
    assert Strategy.from_published(theirs) == STRATEGY
    assert Strategy.from_published(str(theirs), steps=2, layers=1, heads=2) == STRATEGY
    STRATEGY.save(ours)
    assert ours.read_text() == PUBLISHED


@given(strategy=strategies())
def test_the_published_form_and_back_is_the_same(strategy: Strategy) -> None:
    document = strategy.to_published()
    shuffled = dict(sorted(json.loads(json.dumps(document)).items()))  # "10_0_0" before "2_0_0"
    assert Strategy.from_published(shuffled) == strategy
    steps, layers, heads = strategy.shape
    sized = Strategy.from_published(shuffled, steps=steps, layers=layers, heads=heads)
    assert sized.to_published() == document
    for key, window in document.items():
        t, layer, head = map(int, key.split("_"))
        assert strategy.windows[t][layer][head] == tuple(window)


@given(strategy=strategies())
def test_a_table_and_back_is_the_same(strategy: Strategy) -> None:
    table = strategy.to_table()
    assert Strategy.from_table(table) == strategy
    assert Strategy.from_table(table).to_table() == table
    assert (table.num_steps, table.num_layers, table.num_heads) == strategy.shape
    rows = tuple(row for layers in strategy.windows for row in layers)
    assert table.rows() == rows
    assert len(set(table.windows)) == len(table.windows)


def test_a_table_can_be_a_mechanism_of_its_windows() -> None:
    config = cs.STA(window_thw=STRATEGY.to_table(), tile_thw=(6, 8, 8))
    assert config.at(step=1, layer=0).windows == (LOW, EVEN)


def test_a_strategy_of_a_table_with_spare_windows_has_the_same_rows() -> None:
    table = cs.WindowTable(windows=(FULL, LOW, LOW), choice=[[[2, 1]]])
    assert Strategy.from_table(table).to_table().rows() == table.rows()
    flat = cs.WindowTable(windows=((3, 3),), choice=[[[0]]])
    with pytest.raises(CalibrationError, match="windows of 2 axes"):
        Strategy.from_table(flat)


@pytest.mark.parametrize(
    "key", ["0_0", "0_0_0_0", "a_0_0", "00_0_0", "-1_0_0", "0_0_0 ", "٣_0_0", ""]
)
def test_a_malformed_key_is_refused_by_file_and_key(tmp_path: Path, key: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"0_0_0": [1, 1, 1], key: [1, 1, 1]}))
    with pytest.raises(CalibrationError) as caught:
        Strategy.from_published(path)
    assert caught.value.got == f"{path}: key {key!r}"


@pytest.mark.parametrize(
    "value", [None, [1, 1], [1, 1, 1, 1], [0, 1, 1], [1.0, 1, 1], [True] * 3, 3]
)
def test_a_malformed_window_is_refused_by_file_and_key(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"0_0_0": [1, 1, 1], "0_0_1": value}))
    with pytest.raises(CalibrationError) as caught:
        Strategy.from_published(path)
    assert caught.value.got == f"{path}: 0_0_1 is {value!r}"


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"0_0_0": [1, 1, 1], "0_0_0": [3, 3, 3]}')
    with pytest.raises(CalibrationError, match="key '0_0_0' more than once"):
        Strategy.from_published(path)


def test_missing_entries_are_listed() -> None:
    whole = {f"{t}_{i}_{h}": [1, 1, 1] for t in range(3) for i in range(2) for h in range(2)}
    one = {key: value for key, value in whole.items() if key != "1_1_0"}
    with pytest.raises(CalibrationError, match="1 missing: 1_1_0\n"):
        Strategy.from_published(one)
    last = {"2_1_1": [1, 1, 1]}
    with pytest.raises(CalibrationError, match=r"11 missing: 0_0_0, 0_0_1, 0_1_0, \.\.\.\n"):
        Strategy.from_published(last)
    with pytest.raises(CalibrationError, match="4 missing: 3_0_0, 3_0_1, 3_1_0, "):
        Strategy.from_published(whole, steps=4, layers=2, heads=2)
    with pytest.raises(CalibrationError, match="1 missing: 0_0_0\n"):
        Strategy.from_published({}, steps=1, layers=1, heads=1)


def test_a_huge_index_is_an_error_and_not_a_huge_table() -> None:
    with pytest.raises(CalibrationError, match="999999999999 missing: 0_0_0, 0_0_1, 0_0_2, "):
        Strategy.from_published({"999_99999_9999": [1, 1, 1]})


def test_entries_outside_the_sizes_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="1_0_0, 1_0_1 outside the sizes"):
        Strategy.from_published(json.loads(PUBLISHED), steps=1, layers=1, heads=2)


@pytest.mark.parametrize(
    "sizes",
    [{"steps": 2}, {"steps": 2, "layers": 1}, {"steps": 2, "layers": 1, "heads": 0}],
    ids=str,
)
def test_sizes_are_all_given_or_none(sizes: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="sizes of a strategy are incomplete"):
        Strategy.from_published(json.loads(PUBLISHED), **sizes)
    with pytest.raises(CalibrationError, match="and 0 entries in the mapping"):
        Strategy.from_published({})


@pytest.mark.parametrize(
    "windows",
    [(), ((),), (((),),), 3, ((FULL,),), (((FULL,),), ((FULL, FULL),)), ((((1, 1, 0),),),)],
    ids=range(7),
)
def test_what_is_no_full_table_is_refused(windows: Any) -> None:
    with pytest.raises(CalibrationError, match="not a full table of windows"):
        Strategy(windows=windows)


def test_usage_counts_all_heads_most_used_first() -> None:
    assert list(STRATEGY.usage().items()) == [(FULL, 2), (LOW, 1), (EVEN, 1)]
    more = Strategy(windows=(((LOW, EVEN, EVEN),),))
    assert list(more.usage().items()) == [(EVEN, 2), (LOW, 1)]


def test_sparsity_is_told_by_nominal_and_by_effective_windows() -> None:
    # Nominal: 180 + 180 + 30 + 30 of 4 * 180 tiles.
    assert STRATEGY.nominal_sparsity(FULL) == pytest.approx(1 - 420 / 720)
    # On 5 x 7 x 11 tiles the full window acts as 3 x 7 x 11, the others as 3 x 1 x 11, 1 x 7 x 5.
    effective = 1 - (2 * 231 + 33 + 35) / (4 * 385)
    assert STRATEGY.effective_sparsity((5, 7, 11)) == pytest.approx(effective)
    # A window as wide as its axis acts as itself.
    assert STRATEGY.effective_sparsity(FULL) == STRATEGY.nominal_sparsity(FULL)
    for call in (STRATEGY.nominal_sparsity, STRATEGY.effective_sparsity):
        with pytest.raises(CalibrationError, match="not made of three positive integers"):
            call((3, 6))


@given(strategy=strategies(), tiles=st.tuples(*3 * [st.integers(1, 9)]))
def test_effective_sparsity_is_what_is_counted_on_whole_tiles(
    strategy: Strategy, tiles: tuple[int, int, int]
) -> None:
    layout = BlockLayout(tuple(2 * count for count in tiles), (2, 2, 2))
    density, _, _ = table_density(layout, strategy.to_table())
    assert math.isclose(strategy.effective_sparsity(tiles), 1 - density, abs_tol=1e-12)
