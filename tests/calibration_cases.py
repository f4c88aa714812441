"""The wording of the errors of `compiled_sparse.calibration`; see `test_messages.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from file_limits import file_size_limit
from messages import Case

import compiled_sparse as cs
from compiled_sparse.calibration.documents import checked_document
from compiled_sparse.calibration.documents import read_json_object
from compiled_sparse.calibration.documents import with_checksum
from compiled_sparse.calibration.files import canonical_json
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.journal import Journal
from compiled_sparse.calibration.mask_search import MaskSearch
from compiled_sparse.calibration.mask_search import average
from compiled_sparse.calibration.mask_search import read_mask_searches
from compiled_sparse.calibration.strategy import Strategy
from compiled_sparse.calibration.tuning import parse_candidates
from compiled_sparse.calibration.tuning import select_windows
from compiled_sparse.errors import CalibrationError

MODULES = tuple(
    f"calibration/{name}"
    for name in (
        "documents",
        "files",
        "journal",
        "journal_lines",
        "mask_search",
        "strategy",
        "tuning",
    )
)


def in_folder(call: Callable[[Path], object]) -> Callable[[], object]:
    """Run with a folder that is there for the time of the call."""

    def provoke() -> object:
        with TemporaryDirectory() as folder:
            return call(Path(folder))

    return provoke


def with_file(
    text: str, call: Callable[[Path], object], name: str = "a.json"
) -> Callable[[], object]:
    """Run with the path of a file that holds a text."""

    def write_and_call(folder: Path) -> object:
        (folder / name).write_text(text, encoding="utf-8")
        return call(folder / name)

    return in_folder(write_and_call)


def append_twice(path: Path) -> None:
    with Journal.open(path, {}) as journal:
        journal.append("k", {})
        journal.append("k", {})


def append_to_a_full_disk(path: Path) -> None:
    with Journal.open(path, {}) as journal, file_size_limit(path.stat().st_size):
        journal.append("k", {})


def open_twice(path: Path) -> None:
    with Journal.open(path, {}):
        Journal.open(path, {})


def open_for_another_run(path: Path) -> None:
    Journal.open(path, {"steps": 2}).close()
    Journal.open(path, {"steps": 3})


def open_damaged(path: Path) -> None:
    Journal.open(path, {}).close()
    path.write_bytes(path.read_bytes() + b"00000000 {}\n")
    Journal.open(path, {})


def save_twice(folder: Path) -> None:
    for loss in (0.25, 0.5):
        search(loss).save(folder, "a cat")


def search(loss: Any = 0.5, window: Any = (3, 1, 10), **fields: Any) -> MaskSearch:
    losses = {window: [[[loss]]]}
    return MaskSearch(**{"l2_loss": losses, "l1_loss": losses, **fields})


def published(**change: Any) -> dict[str, Any]:
    losses = {"[3, 1, 10]": [[[0.5]]]}
    return {"L2_loss": losses, "L1_loss": losses, **change}


DOCUMENT = {"format": "choice", "version": 1}
ENTRY = {"0_0_0": [3, 3, 3]}
SEARCH_NEXT = "or write it again"
ANOTHER_PATH = "pass another path"


def case(problem: str, got: str, expected: str, step: str, call: Callable[[], object]) -> Case:
    """A case of the one class that these modules raise."""
    return Case(CalibrationError, problem, got, expected, step, call)


CASES = {
    "value that is no JSON": case(
        "value cannot be written as JSON",
        "not JSON serializable",
        "finite numbers, text",
        ".tolist()",
        lambda: canonical_json({"device": object()}),
    ),
    "file that cannot be written": case(
        "file cannot be written",
        "missing/a.json: No such file or directory",
        "a folder that is there",
        "create the folder",
        in_folder(lambda folder: write_atomically(folder / "missing" / "a.json", "")),
    ),
    "document that is no JSON": case(
        "not a choice that can be used",
        "a.json, line 2: Expecting",
        "a JSON object",
        SEARCH_NEXT,
        with_file('{"a":\n}', lambda path: read_json_object(path, "choice")),
    ),
    "document with a repeated key": case(
        "not a choice that can be used",
        "a.json: key 'a' more than once",
        "each key once",
        SEARCH_NEXT,
        with_file('{"a": 1, "a": 2}', lambda path: read_json_object(path, "choice")),
    ),
    "document that is a list": case(
        "not a choice that can be used",
        "a.json: a list",
        "a JSON object",
        SEARCH_NEXT,
        with_file("[]", lambda path: read_json_object(path, "choice")),
    ),
    "document without a version": case(
        "document does not say what it is",
        "format 'choice', version None",
        'text under "format"',
        'add them, {"format"',
        lambda: with_checksum({"format": "choice"}),
    ),
    "document of another format": case(
        "not a losses that can be used",
        "a.json: format 'choice'",
        "format 'losses'",
        SEARCH_NEXT,
        with_file(json.dumps(DOCUMENT), lambda path: checked_document(path, "losses", (1,))),
    ),
    "document of another version": case(
        "not a choice that can be used",
        "a.json: version 1",
        "version 2 or 3",
        SEARCH_NEXT,
        with_file(json.dumps(DOCUMENT), lambda path: checked_document(path, "choice", (3, 2))),
    ),
    "document that was changed": case(
        "not a choice that can be used",
        "a.json: checksum None, and that of the content is ",
        "not changed since it was written",
        SEARCH_NEXT,
        with_file(json.dumps(DOCUMENT), lambda path: checked_document(path, "choice", (1,))),
    ),
    "entry that is there": case(
        "entry cannot be appended to the journal",
        "journal: key 'k', there already",
        "a text that is no key of it",
        "journal.keys",
        in_folder(lambda folder: append_twice(folder / "journal")),
    ),
    "entry on a full disk": case(
        "entry cannot be written to the journal",
        "journal: File too large",
        "room on the disk",
        "what was appended before is kept",
        in_folder(lambda folder: append_to_a_full_disk(folder / "journal")),
    ),
    "journal that is a folder": case(
        "journal cannot be opened",
        "Is a directory",
        "a file that may be read and written",
        ANOTHER_PATH,
        in_folder(lambda folder: Journal.open(folder, {})),
    ),
    "journal that is open": case(
        "journal cannot be locked",
        "journal: it is open for writing already",
        "one writer of a journal at a time",
        "wait for the other process",
        in_folder(lambda folder: open_twice(folder / "journal")),
    ),
    "file that is no journal": case(
        "not a journal that can be used",
        "a.json, line 1: it has no end",
        "a file that Journal wrote",
        ANOTHER_PATH,
        with_file("Dear diary", lambda path: Journal.open(path, {})),
    ),
    "journal of another run": case(
        "journal of another run",
        "journal, line 1: 'steps' is 2",
        "'steps' is 3",
        ANOTHER_PATH,
        in_folder(lambda folder: open_for_another_run(folder / "journal")),
    ),
    "damaged line of a journal": case(
        "not a journal that can be used",
        "a.json, line 2: checksum b'00000000'",
        "a file that Journal wrote",
        "delete the file to begin again",
        with_file("", open_damaged),
    ),
    "windows of one norm": case(
        "not a mask search that can be used",
        "the mapping: windows [(3, 1, 1), (3, 1, 10)]",
        "the same windows in both",
        SEARCH_NEXT,
        lambda: MaskSearch.from_published(published(L1_loss={"[3, 1, 1]": [[[0.5]]]})),
    ),
    "sizes of a search": case(
        "not a mask search that can be used",
        "sizes (1, 1, 2) of (3, 1, 10), (1, 1, 1) of (3, 1, 10)",
        "one number of steps, layers and heads",
        SEARCH_NEXT,
        lambda: MaskSearch.from_published(published(L1_loss={"[3, 1, 10]": [[[0.5, 0.5]]]})),
    ),
    "candidate": case(
        "candidate was not searched",
        "(1, 1, 1) for a search of no file",
        "windows among (3, 1, 10)",
        "search again with it",
        lambda: search().only([(1, 1, 1)]),
    ),
    "fields of a search": case(
        "not a mask search that can be used",
        "an object of 0_0_0",
        "L2_loss and L1_loss",
        SEARCH_NEXT,
        lambda: MaskSearch.from_published(ENTRY),
    ),
    "other losses": case(
        "other losses of the same prompt",
        "mask_search_a_cat_",
        "one search for each prompt",
        "overwrite=True",
        in_folder(save_twice),
    ),
    "folder without searches": case(
        "no results of a mask search",
        "no such file in it",
        'contain "mask"',
        "MaskSearch.save",
        in_folder(read_mask_searches),
    ),
    "no searches": case(
        "nothing to average",
        "no searches",
        "one search or more",
        "read_mask_searches",
        lambda: average([]),
    ),
    "searches that differ": case(
        "searches do not fit each other",
        "b.json: windows (1, 5, 7) for 1 steps x 1 layers x 1 heads",
        "windows (3, 1, 10) for 1 steps x 1 layers x 1 heads, as a.json has",
        "with the same candidates",
        lambda: average([search(origin="a.json"), search(window=(1, 5, 7), origin="b.json")]),
    ),
    "search without windows": case(
        "not a mask search that can be used",
        "L2_loss has no windows",
        "losses by window",
        SEARCH_NEXT,
        lambda: search(l2_loss={}),
    ),
    "ragged losses": case(
        "not a mask search that can be used",
        "L2_loss of (3, 1) is no table of a window",
        "[steps][layers][heads]",
        SEARCH_NEXT,
        lambda: search(window=(3, 1)),
    ),
    "loss": case(
        "not a mask search that can be used",
        "L2_loss of [3, 1, 10] at step 0, layer 0, head 0 is nan",
        "finite numbers of at least 0",
        SEARCH_NEXT,
        lambda: search(float("nan")),
    ),
    "key of a search": case(
        "not a mask search that can be used",
        "the mapping: L2_loss has the key '3x1x10'",
        'like "[3, 1, 10]"',
        SEARCH_NEXT,
        lambda: MaskSearch.from_published(published(L2_loss={"3x1x10": []})),
    ),
    "windows of a strategy": case(
        "Strategy.windows is not a full table of windows",
        "no window at 0_0_1",
        "[steps][layers][heads] of three positive integers",
        "windows=[[[(3, 3, 3)]]]",
        lambda: Strategy(windows=((((3, 3, 3), (3, 3)),),)),
    ),
    "published window": case(
        "not a strategy that can be used",
        "the mapping: 0_0_0 is [3, 3]",
        "[kt, kh, kw]",
        SEARCH_NEXT,
        lambda: Strategy.from_published({"0_0_0": [3, 3]}),
    ),
    "strategy of a flat table": case(
        "a strategy is for videos",
        "windows of 2 axes, (3, 3)",
        "3 axes (T, H, W)",
        "keep it as a WindowTable",
        lambda: Strategy.from_table(cs.WindowTable(windows=((3, 3),), choice=(((0,),),))),
    ),
    "full window": case(
        "full_window is not made of three positive integers",
        "(3, 6)",
        "three integers of at least 1",
        "full_window=(3, 6, 10)",
        lambda: select_windows(search(), full_window=(3, 6)),
    ),
    "key of a strategy": case(
        "not a strategy that can be used",
        "the mapping: key 'version'",
        '"0_12_3" for instance',
        SEARCH_NEXT,
        lambda: Strategy.from_published({"version": 1}),
    ),
    "sizes of a strategy": case(
        "sizes of a strategy are incomplete",
        "steps=1, layers=None, heads=None, and 1 entries in the mapping",
        "all three as integers",
        "those of the model, or none",
        lambda: Strategy.from_published(ENTRY, steps=1),
    ),
    "entry outside a strategy": case(
        "not a strategy that can be used",
        "1_0_0 outside the sizes",
        "1 steps x 1 layers x 1 heads, each once",
        SEARCH_NEXT,
        lambda: Strategy.from_published(ENTRY | {"1_0_0": [3, 3, 3]}, steps=1, layers=1, heads=1),
    ),
    "entry missing from a strategy": case(
        "not a strategy that can be used",
        "1 missing: 0_0_1",
        "1 steps x 1 layers x 2 heads, each once",
        SEARCH_NEXT,
        lambda: Strategy.from_published(ENTRY, steps=1, layers=1, heads=2),
    ),
    "steps of a strategy": case(
        "number of steps is out of range",
        "num_steps=2, dense_first_steps=12",
        "num_steps from 1 to 1",
        "leave num_steps out",
        lambda: select_windows(search(), full_window=(3, 6, 10), num_steps=2),
    ),
    "nothing but the full window": case(
        "no window to choose from",
        "full_window (3, 1, 10), and only that",
        "losses of smaller windows",
        "search with more candidates",
        lambda: select_windows(search(), full_window=(3, 1, 10)),
    ),
    "candidate that is no window": case(
        "not a list of candidate windows",
        "'3x1x10'",
        'like "3, 1, 10"',
        'pass ["3, 1, 10", "1, 5, 7"]',
        lambda: parse_candidates(["3x1x10"]),
    ),
}
