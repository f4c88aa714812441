"""Tables of windows: which window holds when, and what is no table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.pattern import table_density
from compiled_sparse.runtime import table_tensor

SMALL, LARGE = (1, 1, 1), (3, 3, 3)
TABLE = cs.WindowTable(windows=(SMALL, LARGE), choice=(((0,), (1,)), ((1,), (1,)), ((0,), (0,))))


def test_a_row_is_picked_by_step_and_layer() -> None:
    picked = [[TABLE.row(step, layer)[0] for layer in range(2)] for step in range(3)]
    assert picked == [[SMALL, LARGE], [LARGE, LARGE], [SMALL, SMALL]]
    assert (TABLE.num_steps, TABLE.num_layers, TABLE.num_heads) == (3, 2, 1)


def test_past_the_end_the_last_row_holds() -> None:
    table = cs.WindowTable(windows=(SMALL, LARGE), choice=[[[0], [1]], [[1], [0]]])
    assert table.row(9, 0) == (LARGE,)
    assert table.row(9, 9) == (SMALL,)


def test_dimensions_of_one_hold_for_all() -> None:
    table = cs.WindowTable(windows=(SMALL, LARGE), choice=[[[1, 0]]])
    assert table.row(7, 5) == table.row() == (LARGE, SMALL)


def test_the_tensor_holds_the_windows_of_the_rows() -> None:
    tensor = table_tensor(TABLE, torch.device("cpu"))
    assert tensor.shape == (3, 2, 1, 3)
    for step in range(3):
        for layer in range(2):
            assert tensor[step, layer].tolist() == [list(w) for w in TABLE.row(step, layer)]


def test_a_config_with_a_table_survives_json_and_compares_by_value() -> None:
    config = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 2))
    again = MechanismConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert config.num_axes == 3
    assert config.describe() == (
        "sta:window_thw=table(2 windows for 3 steps x 2 layers x 1 heads),tile_thw=2x3x2"
    )


def test_a_config_at_a_step_has_plain_windows() -> None:
    config = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 2))
    assert config.at(0, 1) == cs.STA(window_thw=(LARGE,), tile_thw=(2, 3, 2))
    assert config.at() == config.at(0, 0)
    plain = cs.STA(window_thw=LARGE)
    assert plain.at(3, 4) is plain


def test_the_heads_of_a_table_are_checked() -> None:
    table = cs.WindowTable(windows=(SMALL, LARGE), choice=[[[1, 0, 1]]])
    cs.STA(window_thw=table).check_heads(3)
    with pytest.raises(ConfigError, match="3 windows for 2 heads"):
        cs.STA(window_thw=table).check_heads(2)


@pytest.mark.parametrize(
    "choice",
    [
        (),
        ((),),
        (((),),),
        0,
        (0,),
        ((0,),),
        [[[2]]],
        [[[-1]]],
        [[[True]]],
        [[[0], [0, 1]]],
        [[[0]], [[0], [0]]],
    ],
    ids=str,
)
def test_what_is_no_full_table_of_indices_is_refused(choice: Any) -> None:
    with pytest.raises(ConfigError, match="not a full table of indices"):
        cs.WindowTable(windows=(SMALL, LARGE), choice=choice)


@pytest.mark.parametrize("windows", [(), (3, 3, 3), ((3, 3), (3, 3, 3)), ((0, 1, 1),)], ids=str)
def test_what_is_no_palette_is_refused(windows: Any) -> None:
    with pytest.raises(ConfigError, match="not a palette of windows"):
        cs.WindowTable(windows=windows, choice=[[[0]]])


def test_a_document_with_other_keys_is_refused() -> None:
    with pytest.raises(ConfigFormatError, match="other keys"):
        cs.STA(window_thw={"windows": [[3, 3, 3]], "choices": [[[0]]]})


def test_one_axis_of_table_and_tile_differing_is_refused() -> None:
    with pytest.raises(ConfigError, match="different numbers of axes"):
        cs.STA(window_thw=TABLE, tile_thw=(8, 8))


def test_the_density_of_a_table_is_that_of_its_rows() -> None:
    layout = BlockLayout((4, 4, 4), (1, 2, 2), 0, 5)
    mean, low, high = table_density(layout, TABLE)
    rows = [sta_density(layout, row) for row in TABLE.rows()]
    assert (mean, low, high) == (sum(rows) / 6, min(rows), max(rows))
    assert low < mean < high
