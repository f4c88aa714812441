"""A journal of measurements: one checked line for each, kept whenever the process may die.

Needs `fcntl`, so it works on POSIX systems.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator
from collections.abc import KeysView
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from compiled_sparse.calibration.files import canonical_json
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.journal_lines import FORMAT
from compiled_sparse.calibration.journal_lines import VERSION
from compiled_sparse.calibration.journal_lines import check_header
from compiled_sparse.calibration.journal_lines import read_bodies
from compiled_sparse.calibration.journal_lines import write_line
from compiled_sparse.errors import CalibrationError

logger = logging.getLogger("compiled_sparse")


class Journal:
    """Entries under keys, in a file that only grows; `Journal.open` makes one.

    Each line is the CRC-32 of the rest in 8 hexadecimal digits, a space, and a JSON object. The
    first holds format, version and what the run is about, each other one a key and a body. A line
    is written at once and synced to the disk; one that the end of the process cut short is cut off
    when the file is opened again.

    One process writes a journal at a time, and one thread. Used in a `with` block it is closed.
    """

    def __init__(self, path: Path, descriptor: int, bodies: dict[str, str], size: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self._bodies = bodies
        self._size = size

    @classmethod
    def open(cls, path: str | Path, header: Mapping[str, Any]) -> Journal:
        """Open a journal to read it and go on, or begin one.

        Args:
            path: Its file; the folder must be there.
            header: What the run is about, as JSON values. A file that is there must have the same.

        Raises:
            CalibrationError: if the file cannot be opened, is no journal, is of another version, is
                about something else or is damaged, or if another process writes to it. It is left
                as it was then.
        """
        path = Path(path)
        header = dict(header)
        first_line = write_line({"format": FORMAT, "version": VERSION, "header": header})
        with ExitStack() as on_error:
            descriptor = _open_locked(path, first_line)
            on_error.callback(os.close, descriptor)
            content = _content(descriptor)
            *lines, torn = content.split(b"\n")
            check_header(path, lines, header)
            bodies = read_bodies(path, lines[1:])
            size = len(content) - len(torn)
            if torn:
                logger.info("%s: cut off %d bytes of an unfinished line", path, len(torn))
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
            on_error.pop_all()
        return cls(path, descriptor, bodies, size)

    @property
    def keys(self) -> KeysView[str]:
        """The keys of the entries, in the order written."""
        return self._bodies.keys()

    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return key and body of each entry, in the order written."""
        return ((key, json.loads(text)) for key, text in self._bodies.items())

    def append(self, key: str, body: Mapping[str, Any]) -> None:
        """Write an entry; it is on the disk when this returns.

        Args:
            key: A name that no entry has.
            body: JSON values.

        Raises:
            CalibrationError: if there is an entry of that key, the journal is closed, the body
                cannot be written as JSON, or the disk refuses; no part of the entry is kept then.
        """
        if self._descriptor is None or not _is_text(key) or key in self._bodies:
            refused = "the journal is closed" if self._descriptor is None else "there already"
            raise CalibrationError(
                "entry cannot be appended to the journal",
                got=f"{self._path}: key {key!r}, {refused if _is_text(key) else 'not text'}",
                expected="an open journal, and a text that is no key of it",
                next_step="open it with Journal.open, and ask `key in journal.keys` before",
            )
        text = canonical_json(dict(body))
        reason = self._write(self._descriptor, key, text)
        if reason is not None:
            raise CalibrationError(
                "entry cannot be written to the journal",
                got=f"{self._path}: {reason}",
                expected="room on the disk",
                next_step="make room and append it again; what was appended before is kept",
            )

    def _write(self, descriptor: int, key: str, text: str) -> str | None:
        """Write one line and return None, or the reason why it is not there."""
        line = write_line({"key": key, "body": json.loads(text)})
        try:
            if os.write(descriptor, line) < len(line):
                return "there was room for a part of it only"
            os.fsync(descriptor)
            self._bodies[key] = text
            self._size += len(line)
            return None
        except OSError as error:
            return str(error.strerror or error)
        finally:
            os.ftruncate(descriptor, self._size)  # of a failed write nothing stays

    def close(self) -> None:
        """Close the file and let others write to it; more than once does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _is_text(key: object) -> bool:
    return isinstance(key, str)


def _open_locked(path: Path, first_line: bytes) -> int:
    """Open the journal for this process alone; one that is not there gets its first line."""
    while True:
        with ExitStack() as closing:
            descriptor = _open_existing_or_empty(path)
            closing.callback(os.close, descriptor)
            _lock(path, descriptor)
            if _is_still_at(path, descriptor):
                if not _is_cut_short(_content(descriptor), first_line):
                    closing.pop_all()
                    return descriptor
                # The lock is held until the new file is there, which the next turn opens.
                write_atomically(path, first_line.decode("ascii"))


def _open_existing_or_empty(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise CalibrationError(
            "journal cannot be opened",
            got=f"{path}: {error.strerror}",
            expected="a file that may be read and written, or a folder in which to begin one",
            next_step="create the folder, or pass another path",
        ) from None


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_taken = isinstance(error, BlockingIOError)
        raise CalibrationError(
            "journal cannot be locked",
            got=f"{path}: {'it is open for writing already' if is_taken else error}",
            expected="one writer of a journal at a time, on a file system that has locks",
            next_step="wait for the other process, end it, or pass another path",
        ) from None


def _is_cut_short(content: bytes, first_line: bytes) -> bool:
    """Whether this is a journal whose beginning was cut short: less than this first line."""
    return len(content) < len(first_line) and first_line.startswith(content)


def _is_still_at(path: Path, descriptor: int) -> bool:
    """Whether nobody has replaced the file since it was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _content(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return io.FileIO(descriptor, closefd=False).readall()
