"""Files of calibration: whole or not there, and refused when they were changed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from file_limits import file_size_limit
from hypothesis import given
from hypothesis import strategies as st

from compiled_sparse.calibration.documents import checked_document
from compiled_sparse.calibration.documents import read_json_object
from compiled_sparse.calibration.documents import with_checksum
from compiled_sparse.calibration.files import canonical_json
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.errors import CalibrationError
from compiled_sparse.errors import ConfigFormatError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Lone surrogates are text to JSON, and to Python.
    | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=12,
)


@given(value=VALUES)
def test_canonical_json_is_one_ascii_line_that_reads_back(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert "\n" not in text
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": (1, 2.5), "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
    assert canonical_json({"a": "é", "b": [1, 2.5]}) == '{"a":"\\u00e9","b":[1,2.5]}'


@pytest.mark.parametrize(
    "value",
    [math.nan, [math.inf], {1: 2}, [{"a": {None: 1}}], {1, 2}, b"x", ({"a": Path("x")},)],
    ids=str,
)
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(CalibrationError, match="cannot be written as JSON"):
        canonical_json(value)


def test_a_value_inside_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CalibrationError, match="cannot be written as JSON"):
        canonical_json(loop)


def test_a_file_is_replaced_and_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("first", "zweitens: ü\n"):
        write_atomically(link, text)
        assert target.read_bytes() == text.encode()
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_file_has_the_rights_that_the_process_gives(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.touch()
    write_atomically(written, "")
    assert written.stat().st_mode == plain.stat().st_mode


def test_an_error_keeps_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with file_size_limit(100), pytest.raises(CalibrationError, match="cannot be written") as caught:
        write_atomically(path, "new" * 100)
    assert str(path) in caught.value.got
    with pytest.raises(CalibrationError, match="surrogates not allowed"):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_replaced_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match="cannot be written"):
        write_atomically(tmp_path / "folder", "x")
    with pytest.raises(CalibrationError, match="No such file or directory"):
        write_atomically(tmp_path / "missing" / "a.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


DOCUMENT = {"format": "choice", "version": 2, "windows": [[3, 1, 10]], "loss": 0.1}


def test_a_document_with_its_checksum_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document = with_checksum(DOCUMENT)
    text = '{"format":"choice","loss":0.1,"version":2,"windows":[[3,1,10]]}'
    assert document == {**DOCUMENT, "checksum": hashlib.sha256(text.encode()).hexdigest()}
    assert with_checksum(document) == document
    write_atomically(path, json.dumps(document, indent=2))
    assert checked_document(path, "choice", (1, 2)) == document


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": 0.2}, "checksum"),
        ({"windows": [[3, 1, 10.0]]}, "checksum"),
        ({"added": None}, "checksum"),
        ({"loss": math.nan}, "checksum"),
        ({"checksum": None}, "checksum None"),
        ({"format": "choices"}, "format 'choices'"),
        ({"version": 3}, "version 3"),
        ({"version": True}, "version True"),
        ({"version": [2]}, "version [2]"),
    ],
    ids=str,
)
def test_a_changed_or_foreign_document_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(with_checksum(DOCUMENT) | change))
    with pytest.raises(CalibrationError) as caught:
        checked_document(path, "choice", (1, 2))
    assert f"{path}: {reason}" in caught.value.got


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format":\n "choice",\n}', ", line 3: "),
        ("", ", line 1: "),
        ("[" * 100_000, ": "),
        ("[]", ": a list"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', ": key 'b' more than once"),
    ],
    ids=range(5),
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(CalibrationError) as caught:
        read_json_object(path, "choice")
    assert caught.value.got.startswith(f"{path}{reason}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigFormatError, match=r"missing\.json"):
        checked_document(tmp_path / "missing.json", "choice", (1,))


@pytest.mark.parametrize("change", [{"format": None}, {"version": 0}, {"version": "2"}], ids=str)
def test_a_document_without_format_or_version_gets_no_checksum(change: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="does not say what it is"):
        with_checksum(DOCUMENT | change)
