"""The window rule and densities as integers."""

from __future__ import annotations

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts_with_windows

from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import effective_width
from compiled_sparse.pattern import sta_density
from compiled_sparse.pattern import sta_pairs
from compiled_sparse.pattern import swba_density
from compiled_sparse.pattern import window_start

AXES = [(num_tiles, nominal) for num_tiles in range(1, 13) for nominal in range(1, 16)]


def test_the_window_rule_equals_naive_loops_on_every_axis() -> None:
    for num_tiles, nominal in AXES:
        for tile in range(num_tiles):
            start = window_start(num_tiles, nominal, tile)
            visible = list(range(start, start + effective_width(num_tiles, nominal)))
            assert visible == oracle.window(num_tiles, nominal, tile), (num_tiles, nominal, tile)


def test_an_even_window_acts_as_the_next_odd_one_unless_it_spans() -> None:
    for num_tiles, nominal in AXES:
        if nominal % 2 == 0:
            assert effective_width(num_tiles, nominal) == min(nominal + 1, num_tiles)


def test_a_window_keeps_its_width_at_the_borders() -> None:
    starts = [window_start(7, 3, tile) for tile in range(7)]
    assert starts == [0, 0, 1, 2, 3, 4, 4]


def test_the_published_window_has_its_published_sparsity() -> None:
    layout = BlockLayout((30, 48, 80), (6, 8, 8))
    assert sta_density(layout, ((3, 3, 3),)) == pytest.approx(27 / 300)
    assert sta_density(layout, ((10, 10, 10),)) == 1.0


@given(layouts_with_windows())
def test_density_equals_the_counted_density_of_naive_masks(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    mask = oracle.sta_mask(layout.grid, layout.tile, windows, layout.text_before, layout.text_after)
    assert sta_density(layout, windows) == pytest.approx(mask.double().mean().item())
    for head, window in enumerate(windows):
        assert sta_pairs(layout, window) == int(mask[head].sum())


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 12))
def test_the_density_of_blocks_in_order_is_counted_token_by_token(
    length: int, block: int, window: int
) -> None:
    seen = [[0 <= q // block - k // block < window for k in range(length)] for q in range(length)]
    assert swba_density(length, block, window) == pytest.approx(sum(map(sum, seen)) / length**2)
