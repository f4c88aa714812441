"""The lines of a journal: how one is written, and why one is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiled_sparse.calibration.files import canonical_json
from compiled_sparse.errors import CalibrationError

FORMAT = "compiled_sparse journal"
VERSION = 1

_CHECKSUM_DIGITS = 8
_NEXT = "pass another path, or delete the file to begin again"


def write_line(document: Mapping[str, Any]) -> bytes:
    """Return a document as a line of a journal.

    Raises:
        CalibrationError: if it cannot be written as JSON.
    """
    text = canonical_json(document).encode("ascii")
    return b"%s %s\n" % (_checksum(text), text)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def check_header(path: Path, lines: Sequence[bytes], header: Mapping[str, Any]) -> None:
    """Check that a journal is of this format and version, and about this run.

    Args:
        path: Its path, for errors.
        lines: Its whole lines, without their ends.
        header: What the run is about.

    Raises:
        CalibrationError: if it is not; names the line and what differs.
    """
    document, reason = _parse(lines[0]) if lines else ({}, "it has no end")
    if reason is None:
        reason = _not_a_header(document)
    if reason is not None:
        raise _refusal(path, 1, reason)
    _check_same_run(path, document["header"], header)


def _not_a_header(document: Mapping[str, Any]) -> str | None:
    if document.get("format") != FORMAT:
        return f"format {document.get('format')!r}, not {FORMAT!r}"
    version = canonical_json(document.get("version"))
    if version != str(VERSION):
        return f"version {version}, not {VERSION}"
    if len(document) != 3 or not isinstance(document.get("header"), dict):
        return "other fields than format, version and header"
    return None


def _check_same_run(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in sorted({*found, *expected}):
        shown = [
            canonical_json(each[key]) if key in each else "nothing" for each in (found, expected)
        ]
        if shown[0] != shown[1]:
            raise CalibrationError(
                "journal of another run",
                got=f"{path}, line 1: {key!r} is {shown[0]}",
                expected=f"{key!r} is {shown[1]}",
                next_step=_NEXT,
            )


def read_bodies(path: Path, lines: Sequence[bytes]) -> dict[str, str]:
    """Return the bodies of the entries as JSON text, by key.

    Args:
        path: The journal's path, for errors.
        lines: Its whole lines after the first.

    Raises:
        CalibrationError: if one is damaged, or no entry; names the line and the reason.
    """
    bodies: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        document, reason = _parse(line)
        if reason is None and not _is_entry(document):
            reason = "other fields than a key, which is text, and a body, which is an object"
        elif reason is None and document["key"] in bodies:
            reason = f"key {document['key']!r} for the second time"
        if reason is not None:
            raise _refusal(path, number, reason)
        bodies[document["key"]] = canonical_json(document["body"])
    return bodies


def _is_entry(document: Mapping[str, Any]) -> bool:
    is_whole = document.keys() == {"key", "body"}
    return is_whole and isinstance(document["key"], str) and isinstance(document["body"], dict)


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    """Return the object in a line, or the reason why there is none."""
    checksum, _, text = line.partition(b" ")
    if len(checksum) != _CHECKSUM_DIGITS:
        return {}, "no checksum and space at its beginning"
    if checksum != _checksum(text):
        return {}, f"checksum {checksum!r}, and that of its content is {_checksum(text)!r}"
    try:
        document = json.loads(text)
        is_canonical = canonical_json(document).encode("ascii") == text
    except CalibrationError as error:
        return {}, f"not JSON as it is written here, {error.got}"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON, {error}"
    if not is_canonical or not isinstance(document, dict):
        return {}, "not a JSON object as it is written here"
    return document, None


def _refusal(path: Path, number: int, reason: str) -> CalibrationError:
    return CalibrationError(
        "not a journal that can be used",
        got=f"{path}, line {number}: {reason}",
        expected="a file that Journal wrote and nothing else has changed",
        next_step=_NEXT,
    )
