"""JSON text that is equal for equal values, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiled_sparse.errors import CalibrationError


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, ASCII, one line.

    Args:
        value: None, bool, int, finite float, str, and lists, tuples and dicts with text keys of
            them; a tuple is written as a list.

    Raises:
        CalibrationError: if it holds anything else, NaN and infinities included.
    """
    try:
        # Dumping would turn a key 1 into "1", which may be there as well.
        if not _has_text_keys(value):
            reason = "a key that is not text"
        else:
            return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error)
    raise CalibrationError(
        "value cannot be written as JSON",
        got=reason,
        expected="finite numbers, text, booleans, None, and lists and dicts with text keys of them",
        next_step="convert tensors and arrays with .tolist(), and paths and dtypes with str()",
    )


def _has_text_keys(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(
            map(_has_text_keys, value.values())
        )
    return not isinstance(value, list | tuple) or all(map(_has_text_keys, value))


def write_atomically(path: str | Path, text: str, *, make_folders: bool = False) -> None:
    """Write a file so that at any moment it is either the old one or the whole new one.

    Args:
        path: Its path; a link stays a link.
        text: What to write, in UTF-8.
        make_folders: Whether to make the folder where it is not there.

    Raises:
        CalibrationError: if it cannot be written; the old file is still there then.
    """
    target = Path(os.path.realpath(path))
    try:
        if make_folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, text.encode("utf-8"))
    except (OSError, UnicodeEncodeError) as error:
        raise CalibrationError(
            "file cannot be written",
            got=f"{path}: {getattr(error, 'strerror', None) or error}",
            expected="a path in a folder that is there and may be written to",
            next_step="create the folder, free space, or choose another path",
        ) from None


def _replace(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    file = temporary.open("xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # there no longer, unless something failed
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
