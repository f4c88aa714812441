"""JSON files: read with the reason why one is refused, and with a checksum of what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiled_sparse.calibration.files import canonical_json
from compiled_sparse.config import is_count
from compiled_sparse.config import read_text
from compiled_sparse.errors import CalibrationError
from compiled_sparse.errors import CompiledSparseError


def read_json_object(path: str | Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: Its path.
        what: What it is called in an error, such as "strategy".

    Raises:
        ConfigFormatError: if the file cannot be read.
        CalibrationError: if it is not JSON or not an object, or an object in it has a key twice,
            one of which would be lost.
    """
    text = read_text(Path(path), what, "that holds an object")
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return document

    try:
        document = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise refusal(path, what, f"{error}", "a JSON object", _line_of(error)) from None
    if repeated:
        raise refusal(path, what, f"key {repeated[0]!r} more than once", "each key once")
    if not isinstance(document, dict):
        raise refusal(path, what, f"a {type(document).__name__}", "a JSON object")
    return document


def read_published(
    source: str | Path | Mapping[str, Any], what: str
) -> tuple[Mapping[str, Any], str]:
    """Return the JSON object that is given or in a given file, and where it is from, in words.

    Args:
        source: The object, or the path of a file.
        what: What it is called in an error, such as "strategy".

    Raises:
        ConfigFormatError: if the file cannot be read.
        CalibrationError: if it holds no JSON object.
    """
    if isinstance(source, Mapping):
        return source, "the mapping"
    return read_json_object(source, what), str(source)


def refusal(
    path: str | Path, what: str, reason: str, expected: str, line: int | None = None
) -> CalibrationError:
    """Return the error that says why a file is not read.

    Args:
        path: Its path, or another word for where the content is from.
        what: What it is called, such as "strategy".
        reason: What is wrong with it, in words.
        expected: What would have been accepted.
        line: The line that is wrong, from 1, where it is known.
    """
    place = f"{path}, line {line}" if line is not None else f"{path}"
    return CalibrationError(
        f"not a {what} that can be used",
        got=f"{place}: {reason}",
        expected=expected,
        next_step="check the path, take the file from where it was written, or write it again",
    )


def reason_of(error: Exception) -> str:
    """Return in one line what is wrong with a content whose reading raised."""
    if isinstance(error, CompiledSparseError):
        return f"{error.problem}: {error.got}"
    return f"{type(error).__name__}: {error}"


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the checksum that `checked_document` asks for.

    Args:
        document: An object with a "format" (text) and a "version" (integer) of at least 1.

    Returns:
        The same with "checksum", the SHA-256 of the canonical JSON of everything else.

    Raises:
        CalibrationError: if format or version are missing, or it cannot be written as JSON.
    """
    content = {key: value for key, value in document.items() if key != "checksum"}
    if not isinstance(content.get("format"), str) or not is_count(content.get("version")):
        raise CalibrationError(
            "document does not say what it is",
            got=f"format {content.get('format')!r}, version {content.get('version')!r}",
            expected='text under "format" and an integer of at least 1 under "version"',
            next_step='add them, {"format": "losses", "version": 1, ...} for instance',
        )
    return {**content, "checksum": _checksum(canonical_json(content))}


def checked_document(
    path: str | Path, document_format: str, versions: Collection[int]
) -> dict[str, Any]:
    """Read a document that `with_checksum` made, and check that it is still the same.

    Args:
        path: The path of the JSON file.
        document_format: The "format" it must have.
        versions: The versions that can be read.

    Raises:
        ConfigFormatError: if the file cannot be read.
        CalibrationError: if it is not JSON, of another format or version, or was changed.
    """
    document = read_json_object(path, document_format)
    if document.get("format") != document_format:
        shown = document.get("format")
        raise refusal(path, document_format, f"format {shown!r}", f"format {document_format!r}")
    version = document.get("version")
    if not is_count(version) or version not in versions:
        known = " or ".join(map(str, sorted(versions)))
        raise refusal(path, document_format, f"version {version!r}", f"version {known}")
    content = {key: value for key, value in document.items() if key != "checksum"}
    try:
        found = _checksum(canonical_json(content))
    except CalibrationError as error:
        found = f"none, {error.got}"
    if document.get("checksum") != found:
        raise refusal(
            path,
            document_format,
            f"checksum {document.get('checksum')!r}, and that of the content is {found}",
            "a file that was not changed since it was written",
        )
    return document


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _line_of(error: Exception) -> int | None:
    return error.lineno if isinstance(error, json.JSONDecodeError) else None
