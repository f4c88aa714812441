"""Journals: what is in one after any interruption, and what is refused."""

from __future__ import annotations

import fcntl
import json
import logging
import random
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from file_limits import file_size_limit

import compiled_sparse as cs
from compiled_sparse.calibration.journal import Journal
from compiled_sparse.errors import CalibrationError

HEADER = {"candidates": [[3, 1, 10], [1, 5, 7]], "steps": 2, "model": "tïny"}
ENTRIES = [(f"prompt {i}", {"losses": [0.1 * i, 1e-9], "text": "é\n" * i}) for i in range(4)]

# The packages without what loads torch: the journal alone starts fast.
CHILD = f"""
import pathlib, sys, types
root = pathlib.Path({str(Path(cs.__file__).parent)!r})
for name in ("compiled_sparse", "compiled_sparse.calibration"):
    package = types.ModuleType(name)
    package.__path__ = [str(root.parent.joinpath(*name.split(".")))]
    sys.modules[name] = package
from compiled_sparse.calibration.journal import Journal
from compiled_sparse.errors import CalibrationError
assert "torch" not in sys.modules
"""


def line(text: str) -> bytes:
    """A line as it should be, written out independently."""
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def write(path: Path, entries: list[tuple[str, dict[str, Any]]] = ENTRIES) -> bytes:
    """Write a journal, and return what is in the file."""
    with Journal.open(path, HEADER) as journal:
        for key, body in entries:
            journal.append(key, body)
    return path.read_bytes()


def refused(path: Path, header: dict[str, Any] = HEADER) -> CalibrationError:
    """Open a journal, which must fail, must name the file and must not change it."""
    before = path.read_bytes()
    with pytest.raises(CalibrationError) as caught:
        Journal.open(path, header)
    assert path.read_bytes() == before
    assert str(path) in caught.value.got
    return caught.value


def test_lines_are_a_checksum_and_sorted_compact_json(tmp_path: Path) -> None:
    content = write(tmp_path / "a", [("k", {"b": 1, "a": (0.5, None)})])
    assert content == line(
        '{"format":"compiled_sparse journal","header":{"candidates":[[3,1,10],[1,5,7]],'
        '"model":"t\\u00efny","steps":2},"version":1}'
    ) + line('{"body":{"a":[0.5,null],"b":1},"key":"k"}')
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_was_appended_is_there_in_order_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, ENTRIES[::-1][:2])
    with Journal.open(path, HEADER) as journal:
        assert list(journal.keys) == ["prompt 3", "prompt 2"]
        assert list(journal.entries()) == ENTRIES[::-1][:2]
        journal.append(*ENTRIES[0])
        assert list(journal.entries()) == [*ENTRIES[::-1][:2], ENTRIES[0]]
    with Journal.open(path, HEADER) as journal:
        assert "prompt 0" in journal.keys
        assert len(journal.keys) == 3


def test_entries_are_the_same_before_and_after_opening_again(tmp_path: Path) -> None:
    body = {"window": (1, 2, 3), "loss": 0.1 + 0.2}
    with Journal.open(tmp_path / "a", HEADER) as journal:
        journal.append("k", body)
        body["loss"] = 0.0  # the journal has a copy
        found = list(journal.entries())
    with Journal.open(tmp_path / "a", HEADER) as journal:
        assert found == list(journal.entries()) == [("k", {"window": [1, 2, 3], "loss": 0.1 + 0.2})]


def test_a_file_cut_anywhere_is_opened_and_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries: list[tuple[str, dict[str, Any]]] = [("a", {}), ("é", {"loss": 0.5})]
    whole = write(tmp_path / "whole", entries)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    path = tmp_path / "cut"
    caplog.set_level(logging.INFO, "compiled_sparse")
    for length in [*range(0, ends[0], 5), *range(ends[0] - 1, len(whole))]:
        caplog.clear()
        path.write_bytes(whole[:length])
        with Journal.open(path, HEADER) as journal:
            kept = len(journal.keys)
            assert list(journal.entries()) == entries[:kept]
            for key, body in entries[kept:]:
                journal.append(key, body)
        assert kept == max(0, sum(end <= length for end in ends) - 1)
        assert path.read_bytes() == whole
        cut = length - max((end for end in ends if end <= length), default=length)
        logged = [record.getMessage() for record in caplog.records]
        assert logged == ([f"{path}: cut off {cut} bytes of an unfinished line"] if cut else [])


def test_a_flipped_bit_anywhere_in_a_whole_line_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole = write(path, ENTRIES[1:])
    for position in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        number = whole.count(b"\n", 0, position) + 1
        # A line that ends at another place is damaged as well, and found where it begins.
        assert f"line {number}: " in refused(path).got


def test_a_damaged_last_line_is_refused_and_a_torn_one_behind_it_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole = write(path)
    path.write_bytes(whole.replace(b"prompt 3", b"prompt 4"))
    assert "line 5: checksum" in refused(path).got
    path.write_bytes(whole.replace(b"prompt 1", b"prompt 9") + b"torn")
    assert "line 3: checksum" in refused(path).got


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (b"\n", "no checksum"),
        (b"hello there\n", "no checksum"),
        (line('{"body":{},"key":"k"'), "not JSON"),
        (line('{"body":{"a":NaN},"key":"k"}'), "not JSON as it is written here"),
        (line('{"body":{"a":1,"a":2},"key":"k"}'), "as it is written here"),
        (line('{"key":"k","body":{}}'), "as it is written here"),
        (line("[" * 100_000), "not JSON"),
        (line("[1]"), "not a JSON object"),
        (line('{"body":[],"key":"k"}'), "other fields"),
        (line('{"body":{},"key":1}'), "other fields"),
        (line('{"body":{},"key":"k","more":1}'), "other fields"),
        (line('{"body":{},"key":"prompt 1"}'), "key 'prompt 1' for the second time"),
        (line('{"body":{},"key":"k"}').upper(), "checksum"),
    ],
    ids=range(13),
)
def test_a_whole_line_that_is_no_entry_is_refused(
    tmp_path: Path, added: bytes, reason: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(write(path) + added)
    got = refused(path).got
    assert "line 6: " in got
    assert reason in got


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Dear diary,\n", "no checksum"),
        (b"Dear diary", "no end"),
        (b"\x00\x80\xff" * 50, "no end"),
        (b"{}", "no end"),
        (line('{"format":"log","header":{},"version":1}'), "format 'log'"),
        (line('{"format":"compiled_sparse journal","header":{},"version":2}'), "version 2, not 1"),
        (line('{"format":"compiled_sparse journal","version":true}'), "version true"),
        (line('{"format":"compiled_sparse journal","header":[],"version":1}'), "other fields"),
        (line('{"format":"compiled_sparse journal","version":1}'), "other fields"),
        (line('{"body":{},"key":"k"}'), "format None"),
    ],
    ids=range(10),
)
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    got = refused(path).got
    assert "line 1: " in got
    assert reason in got


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"steps": 3}, "'steps' is 2"),
        ({"steps": 2.0}, "'steps' is 2"),
        ({"more": None}, "'more' is nothing"),
        ({"model": "tiny"}, "'model' is"),
    ],
    ids=str,
)
def test_a_journal_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], shown: str
) -> None:
    path = tmp_path / "a"
    write(path)
    error = refused(path, HEADER | change)
    assert f"line 1: {shown}" in error.got
    ((key, value),) = change.items()
    assert error.expected == f"{key!r} is {json.dumps(value)}"


def test_a_torn_header_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(write(path, [])[:-3])
    assert "no end" in refused(path, HEADER | {"steps": 3}).got
    with Journal.open(path, HEADER) as journal:
        assert not journal.keys


def test_an_entry_is_written_once_and_a_closed_journal_takes_none(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "a", HEADER)
    journal.append("k", {})
    for key, reason in (("k", "there already"), (1, "not text")):
        with pytest.raises(CalibrationError, match=reason):
            journal.append(key, {"other": 1})
    with pytest.raises(CalibrationError, match="cannot be written as JSON"):
        journal.append("n", {"loss": float("nan")})
    journal.close()
    journal.close()
    with pytest.raises(CalibrationError, match="closed"):
        journal.append("m", {})
    with Journal.open(tmp_path / "a", HEADER) as again:
        assert list(again.entries()) == [("k", {})]


@pytest.mark.parametrize("room", [0, 1, 40])
def test_an_entry_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path, room: int) -> None:
    path = tmp_path / "a"
    whole = write(path, ENTRIES[:2])
    with Journal.open(path, HEADER) as journal:
        with (
            file_size_limit(len(whole) + room),
            pytest.raises(CalibrationError, match="cannot be written to the journal"),
        ):
            journal.append(*ENTRIES[2])
        assert path.read_bytes() == whole
        assert len(journal.keys) == 2
        journal.append(*ENTRIES[2])
    assert path.read_bytes() == write(tmp_path / "b", ENTRIES[:3])


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = f"""
    try:
        Journal.open({str(path)!r}, {HEADER!r})
    except CalibrationError as error:
        print(error.got)
    """
    command = [sys.executable, "-c", CHILD + textwrap.dedent(code)]
    with Journal.open(path, HEADER) as journal:
        assert "open for writing already" in refused(path).got
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert printed.strip() == f"{path}: it is open for writing already"
        journal.append(*ENTRIES[0])
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == ""


def test_of_many_that_begin_a_journal_at_once_one_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = f"""
    import time
    time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
    try:
        with Journal.open({str(path)!r}, {{}}) as journal:
            journal.append(sys.argv[2], {{}})
            print("written")
            sys.stdin.read()
    except CalibrationError:
        print("refused")
    """
    start = str(time.time() + 0.4)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD + textwrap.dedent(code), start, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    said = [child.stdout.readline().strip() for child in children if child.stdout]
    for child in children:
        child.communicate()
    assert sorted(said) == ["refused"] * 3 + ["written"]
    with Journal.open(path, {}) as journal:
        assert list(journal.keys) == [str(said.index("written"))]


def test_a_journal_that_another_begins_meanwhile_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "a", fcntl.flock

    def lock_after_another(descriptor: int, operation: int) -> None:
        """Let another writer come and go between the opening of the file and its lock."""
        monkeypatch.setattr(fcntl, "flock", lock)
        write(path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_after_another)
    with Journal.open(path, HEADER) as journal:
        assert list(journal.entries()) == ENTRIES
        assert "open for writing already" in refused(path).got


KILLED = f"""
with Journal.open(sys.argv[1], {HEADER!r}) as journal:
    for i in range(int(sys.argv[2])):
        journal.append(str(i), {{"losses": "x" * (i % 5 * 100_000)}})
        print(i, flush=True)
"""
NUM_ENTRIES = 15


def large_entries() -> list[tuple[str, dict[str, Any]]]:
    return [(str(i), {"losses": "x" * (i % 5 * 100_000)}) for i in range(NUM_ENTRIES)]


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_leaves_a_beginning_that_can_be_gone_on_with(
    tmp_path: Path, seed: int
) -> None:
    began = time.monotonic()
    whole = write(tmp_path / "whole", large_entries())
    needed = time.monotonic() - began
    moments, kept = random.Random(seed), []
    for run in range(5):
        path = tmp_path / f"run {run}"
        command = [sys.executable, "-c", CHILD + KILLED, str(path), str(NUM_ENTRIES)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            if run:  # after the first entry; else while there may be no journal yet
                child.stdout.readline()
            time.sleep(moments.uniform(0.0, needed if run else 0.1))
            child.kill()
        with Journal.open(path, HEADER) as journal:
            kept.append(len(journal.keys))
            assert list(journal.entries()) == large_entries()[: kept[-1]]
            for key, body in large_entries()[kept[-1] :]:
                journal.append(key, body)
        assert path.read_bytes() == whole
        path.unlink()
    assert any(0 < count < NUM_ENTRIES for count in kept), kept
