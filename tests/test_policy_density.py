"""The densities of a policy by layer and step, against counts by hand, and their heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compiled_sparse as cs
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.pattern import swba_density
from compiled_sparse.plots import plot_density
from compiled_sparse.plots.density_drawing import density_title
from compiled_sparse.plots.density_drawing import draw_density
from compiled_sparse.policy_density import PolicyDensity
from compiled_sparse.policy_density import policy_density

GRID, TILE = (5, 8, 12), (2, 4, 4)
SIZES: dict[str, Any] = {"grid_thw": GRID, "heads": 2, "layers": 4, "steps": 5}
STA = cs.STA(window_thw=(1, 1, 3), tile_thw=TILE)


def density(window: tuple[int, ...], text: int = 0) -> float:
    return sta_density(BlockLayout(GRID, TILE, 0, text), (window,))


def counted(policy: Any, **changes: Any) -> PolicyDensity:
    return policy_density(policy, **{**SIZES, **changes})


def test_steps_and_layers_of_the_schedule_are_dense() -> None:
    policy = cs.Policy(
        {"*": STA},
        dense_first_steps=2,
        dense_last_steps=1,
        dense_first_layers=1,
        dense_last_layers=1,
    )
    sparse = density((1, 1, 3))
    assert sparse < 0.5
    row = (1.0, 1.0, sparse, sparse, 1.0)
    table = counted(policy)
    assert table.densities == ((1.0,) * 5, row, row, (1.0,) * 5)
    assert table.mean == pytest.approx((16 + 4 * sparse) / 20)


def test_a_table_of_windows_is_counted_by_step_layer_and_head() -> None:
    windows = ((1, 1, 1), (1, 1, 3), (3, 1, 1))
    choice = [[[0, 1], [1, 1]], [[2, 2], [0, 2]]]
    config = cs.STA(window_thw=cs.WindowTable(windows=windows, choice=choice), tile_thw=TILE)  # type: ignore[arg-type]
    a, b, c = map(density, windows)
    table = counted(config, layers=3, steps=3)
    # A step or layer past the end has the last row.
    expected = (
        ((a + b) / 2, c, c),
        (b, (a + c) / 2, (a + c) / 2),
        (b, (a + c) / 2, (a + c) / 2),
    )
    for row, wanted in zip(table.densities, expected, strict=True):
        assert row == pytest.approx(wanted)


def test_layers_of_vmoba_take_their_turns() -> None:
    config = cs.VMoBA(first_full_step=1, first_full_layer=1, moba_select_mode="topk")
    table = counted(config, grid_thw=(12, 24, 24), layers=5, steps=2)
    kinds = [row[1] for row in table.densities]
    assert [row[0] for row in table.densities] == [1.0] * 5
    assert kinds[0] == 1.0
    assert len(set(kinds[1:4])) > 1
    assert kinds[4] == kinds[1]


def test_the_paths_say_which_rule_a_layer_has() -> None:
    policy = cs.Policy({"model.blocks.[01].attn": STA, "model.blocks.3.attn": "dense"})
    table = counted(policy, paths="model.blocks.{layer}.attn")
    assert [row[0] for row in table.densities] == [density((1, 1, 3))] * 2 + [1.0] * 2


def test_rules_for_joint_calls_are_for_those_with_text() -> None:
    policy = cs.Policy({"joint:*": STA})
    table = counted(policy, text=cs.Text(after=7))
    assert table.densities[0][0] == density((1, 1, 3), text=7)
    with pytest.raises(ConfigError, match="self calls at blocks"):
        counted(policy)


def test_every_form_of_a_policy_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(cs.Policy({"*": STA}).to_json(), encoding="utf-8")
    forms = [STA, STA.describe(), {"blocks.*": STA, "*": "dense"}, path, str(path)]
    tables = [counted(form) for form in forms]
    assert {table.densities for table in tables} == {tables[0].densities}
    names = [table.policy for table in tables]
    assert names == [STA.describe()] * 2 + ["policy of 2 rules"] + ["mine.json"] * 2
    swba = counted("swba:block=16,window=2")
    assert swba.mean == pytest.approx(swba_density(5 * 8 * 12, 16, 2))
    # Automatic mode leaves a short sequence dense; that is its own decision and no misfit.
    assert counted(None).mean == 1.0
    large = counted("careful", grid_thw=(21, 30, 52), layers=3, steps=13)
    assert [[value < 1 for value in row[11:]] for row in large.densities] == [
        [False, False],
        [False, False],
        [False, True],
    ]


def test_the_title_says_policy_grid_and_mean() -> None:
    table = counted(STA, text=cs.Text(after=20))
    assert density_title(table).splitlines() == [
        "Density of sta:window_thw=1x1x3,tile_thw=2x4x4 by layer and step, mean over 2 heads",
        f"Grid 5×8×12 (500 tokens, 20 of them text): mean density {table.mean:.3f}",
    ]
    long = PolicyDensity(
        policy="x" * 100, grid_thw=GRID, text=cs.Text(), heads=1, densities=((1.0,),)
    )
    assert f"{'x' * 77}... by layer and step\n" in density_title(long)


def test_small_tables_are_written_into_the_cells() -> None:
    table = counted(cs.Policy({"*": STA}, dense_first_steps=1))
    axes = draw_density(table).axes[0]
    shown = f"{density((1, 1, 3)):.2f}"
    assert [text.get_text() for text in axes.texts] == ["1", shown, shown, shown, shown] * 4
    assert axes.images[0].get_array().tolist() == [list(row) for row in table.densities]
    assert not draw_density(counted(STA, layers=13)).axes[0].texts
    assert not draw_density(counted(STA, steps=21)).axes[0].texts


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = plot_density(counted(STA), path=tmp_path / "new" / "density.pdf")
    assert path == tmp_path / "new" / "density.pdf"
    assert path.read_bytes().startswith(b"%PDF")


def test_what_does_not_fit_is_refused() -> None:
    per_head = cs.STA(window_thw=((1, 1, 1), (1, 1, 3), (3, 1, 1)), tile_thw=TILE)
    with pytest.raises(ConfigError, match="heads_mismatch"):
        counted(per_head)
    with pytest.raises(ShapeError, match="steps is no size"):
        counted(STA, steps=0)
    with pytest.raises(ConfigFormatError):
        counted("nowhere.json")
