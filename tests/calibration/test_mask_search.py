"""Results of a mask search: the published form, the files of a folder, the average."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from compiled_sparse.calibration.mask_search import MaskSearch
from compiled_sparse.calibration.mask_search import average
from compiled_sparse.calibration.mask_search import read_mask_searches
from compiled_sparse.calibration.strategy import Strategy
from compiled_sparse.errors import CalibrationError
from compiled_sparse.errors import ConfigFormatError

# Two steps, one layer, three heads, as the published program writes it.
PUBLISHED = """{"L2_loss": {"[3, 1, 10]": [[[0.5, 0.25, 1e-06]], [[0, 2.0, 3.5]]],
 "[1, 5, 7]": [[[0.75, 0.125, 0.0]], [[1.0, 2.0, 3.0]]]},
 "L1_loss": {"[1, 5, 7]": [[[0.1, 0.2, 0.3]], [[0.4, 0.5, 0.6]]],
 "[3, 1, 10]": [[[0.6, 0.5, 0.4]], [[0.3, 0.2, 0.1]]]}}"""


def search(first: Any = 0.5, second: Any = 0.25, **fields: Any) -> MaskSearch:
    """A search of two windows for one head."""
    losses = {(3, 1, 10): [[[first]]], (1, 5, 7): [[[second]]]}
    return MaskSearch(**{"l2_loss": losses, "l1_loss": losses, **fields})


def test_a_published_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mask_search_a_cat.json"
    path.write_text(PUBLISHED)
    found = MaskSearch.from_published(path)
    assert found.candidates == ((3, 1, 10), (1, 5, 7))
    assert list(found.l1_loss) == [(3, 1, 10), (1, 5, 7)]
    assert found.shape == (2, 1, 3)
    assert found.l2_loss[3, 1, 10] == (((0.5, 0.25, 1e-06),), ((0, 2.0, 3.5),))
    assert found.l1_loss[1, 5, 7] == (((0.1, 0.2, 0.3),), ((0.4, 0.5, 0.6),))
    assert found.origin == str(path)


def test_what_is_saved_has_the_published_form_and_is_found_again(tmp_path: Path) -> None:
    original = MaskSearch.from_published(json.loads(PUBLISHED))
    path = original.save(tmp_path / "made" / "for it", "a cat")
    assert json.loads(path.read_text()) == json.loads(PUBLISHED)
    assert path.name.startswith("mask_search_a_cat_")
    assert path.name.endswith(".json")
    assert read_mask_searches(path.parent) == (original,)


def test_losses_keep_every_bit(tmp_path: Path) -> None:
    losses = (0.1 + 0.2, 5e-324)
    search(*losses).save(tmp_path, "")
    assert read_mask_searches(tmp_path) == (search(*losses),)


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "/", "a\x00b\nc", "猫" * 80, "CON: *?<>|\"'", "", "\ud800"]
)
def test_a_name_is_safe_whatever_the_prompt(tmp_path: Path, prompt: str) -> None:
    path = search().save(tmp_path, prompt)
    assert path.parent == tmp_path
    assert path.name.isascii()
    assert set("/\\\0:*?<>|\"' ").isdisjoint(path.name)
    assert len(path.name) < 100
    assert read_mask_searches(tmp_path) == (search(),)


def test_prompts_that_begin_alike_have_files_of_their_own(tmp_path: Path) -> None:
    beginning = "a long shot of a cat that walks along a wall, and then"
    assert len(beginning) > 50
    for i, end in enumerate(("jumps", "sleeps")):
        search(i).save(tmp_path, f"{beginning} {end}")
    assert len(list(tmp_path.iterdir())) == 2
    assert {found.l2_loss[3, 1, 10] for found in read_mask_searches(tmp_path)} == {
        (((0,),),),
        (((1,),),),
    }


def test_other_losses_of_a_prompt_replace_it_only_when_that_is_said(tmp_path: Path) -> None:
    path = search(1.0).save(tmp_path, "cat")
    assert search(1.0).save(tmp_path, "cat") == path
    with pytest.raises(CalibrationError, match="other losses of the same prompt") as caught:
        search(2.0).save(tmp_path, "cat")
    assert str(path) in caught.value.got
    assert read_mask_searches(tmp_path) == (search(1.0),)
    assert search(2.0).save(tmp_path, "cat", overwrite=True) == path
    assert read_mask_searches(tmp_path) == (search(2.0),)


def test_a_folder_is_read_by_name_and_without_its_folders(tmp_path: Path) -> None:
    for name in ("b_mask.json", "mask_search_c.json", "a_mask_1.json"):
        (tmp_path / name).write_text(PUBLISHED)
    (tmp_path / "mask_inner").mkdir()
    (tmp_path / "mask_inner" / "mask_search_d.json").write_text("not read")
    (tmp_path / "mask_folder.json").mkdir()
    (tmp_path / "mask_notes.txt").write_text("not read")
    (tmp_path / "search.json").write_text("not read")
    Strategy(windows=(((((1, 1, 1)),),),)).save(tmp_path / "mask_strategy_s12.json")
    names = [Path(found.origin).name for found in read_mask_searches(tmp_path)]
    assert names == ["a_mask_1.json", "b_mask.json", "mask_search_c.json"]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mask_strategy.json").write_text("{}")
    with pytest.raises(CalibrationError, match="no such file in it"):
        read_mask_searches(tmp_path)
    with pytest.raises(CalibrationError, match="not a folder"):
        read_mask_searches(tmp_path / "missing")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"L1_loss": None}, "L1_loss has no windows"),
        ({"L2_loss": {}}, "L2_loss has no windows"),
        ({"more": {}}, "an object of L2_loss, L1_loss, more"),
        ({"L2_loss": {"3, 1, 10": [[[0.1]]]}}, "L2_loss has the key '3, 1, 10'"),
        ({"L2_loss": {"[3, 1]": [[[0.1]]]}}, "L2_loss has the key '[3, 1]'"),
        ({"L2_loss": {"[3, 0, 1]": [[[0.1]]]}}, "L2_loss has the key '[3, 0, 1]'"),
        (
            {"L2_loss": {"[3, 1, 1]": [[[0.1]]], "[3,1,1]": [[[0.1]]]}},
            "'[3,1,1]' for a second time",
        ),
        ({"L2_loss": {"[3, 1, 1]": [[[0.1]]]}}, "in one of L2_loss and L1_loss only"),
        ({"L2_loss": {"[3, 1, 10]": 0.1}}, "is no table"),
        ({"L2_loss": {"[3, 1, 10]": [[[]]]}}, "is no table"),
        ({"L2_loss": {"[3, 1, 10]": [[[0.1]], [[0.1], [0.1]]]}}, "is no table"),
        ({"L2_loss": {"[3, 1, 10]": [[[0.1, 0.2]]]}}, "sizes (1, 1, 1) of (3, 1, 10), (1, 1, 2)"),
        ({"L2_loss": {"[3, 1, 10]": [[[math.nan]]]}}, "step 0, layer 0, head 0 is nan"),
        ({"L2_loss": {"[3, 1, 10]": [[[math.inf]]]}}, "head 0 is inf"),
        ({"L2_loss": {"[3, 1, 10]": [[["0.1"]]]}}, "head 0 is '0.1'"),
        ({"L2_loss": {"[3, 1, 10]": [[[True]]]}}, "head 0 is True"),
        ({"L2_loss": {"[3, 1, 10]": [[[-0.1]]]}}, "head 0 is -0.1"),
    ],
    ids=range(17),
)
def test_a_file_that_is_no_search_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "mask_search_x.json"
    losses = {"[3, 1, 10]": [[[0.1]]]}
    path.write_text(json.dumps({"L2_loss": losses, "L1_loss": losses, **change}))
    (tmp_path / "mask_search_a.json").write_text(PUBLISHED)
    with pytest.raises(CalibrationError) as caught:
        read_mask_searches(tmp_path)
    assert caught.value.got.startswith(f"{path}: ")
    assert reason in caught.value.got


def test_a_repeated_key_and_damaged_json_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mask_search_x.json"
    path.write_text('{"L2_loss": {"[1, 1, 1]": 1, "[1, 1, 1]": 2}, "L1_loss": {}}')
    with pytest.raises(CalibrationError, match=r"x\.json: key '\[1, 1, 1\]' more than once"):
        read_mask_searches(tmp_path)
    path.write_text('{"L2_loss": {},\n"L1_loss": ')
    with pytest.raises(CalibrationError, match=r"x\.json, line 2: "):
        read_mask_searches(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigFormatError, match=r"x\.json"):
        read_mask_searches(tmp_path)


def test_a_window_of_a_search_is_three_positive_integers() -> None:
    for window in [(3, 1), (3, 1, 0), (3, 1, True), "abc"]:
        with pytest.raises(CalibrationError, match="is no table of a window"):
            MaskSearch(l2_loss={window: [[[0.1]]]}, l1_loss={window: [[[0.1]]]})


def test_some_windows_are_taken_in_the_order_given() -> None:
    both = search()
    assert both.only([(1, 5, 7), (3, 1, 10)]).candidates == ((1, 5, 7), (3, 1, 10))
    assert both.only([[1, 5, 7]]).l1_loss == {(1, 5, 7): (((0.25,),),)}
    with pytest.raises(CalibrationError, match=r"\(1, 1, 1\) for a search of no file"):
        both.only([(1, 5, 7), (1, 1, 1)])


def test_the_average_weighs_each_search_alike_and_keeps_the_first_order() -> None:
    other = search(1.0, 0.75).only([(1, 5, 7), (3, 1, 10)])
    mean = average([search(), other, search(0.0, 0.125)])
    assert mean.candidates == ((3, 1, 10), (1, 5, 7))
    assert mean.l2_loss == {(3, 1, 10): (((0.5,),),), (1, 5, 7): (((0.375,),),)}
    assert mean.l1_loss == mean.l2_loss


def test_the_average_does_not_depend_on_the_order_of_the_searches() -> None:
    values = [0.1, 0.2, 0.3]  # 0.6000000000000001 one way, 0.6 the other
    forwards = average([search(value) for value in values])
    assert forwards == average([search(value) for value in values[::-1]])


def test_an_average_of_searches_that_differ_names_the_one_that_does() -> None:
    wide = {(3, 1, 10): [[[0.1, 0.2]]], (1, 5, 7): [[[0.1, 0.2]]]}
    for other in (
        search().only([(1, 5, 7)]),
        MaskSearch(l2_loss=wide, l1_loss=wide),
    ):
        odd = MaskSearch(l2_loss=other.l2_loss, l1_loss=other.l1_loss, origin="odd.json")
        with pytest.raises(CalibrationError, match="do not fit") as caught:
            average([search(origin="first.json"), search(), odd, search()])
        assert caught.value.got.startswith("odd.json: windows ")
        assert "first.json" in caught.value.expected
    with pytest.raises(CalibrationError, match="nothing to average"):
        average([])
