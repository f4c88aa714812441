"""What was measured so far: in memory, and in a journal where there is one."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from compiled_sparse.calibration.documents import reason_of
from compiled_sparse.calibration.documents import refusal
from compiled_sparse.calibration.journal import Journal
from compiled_sparse.calibration.measurements import CallKey
from compiled_sparse.calibration.measurements import SiteErrors
from compiled_sparse.config import MechanismConfig

Sites = tuple[SiteErrors, ...]


class Entries:
    """The attention calls of each call of a model.

    Args:
        journal: Where they are written as they come; None for nowhere.
        held: What it holds already.
    """

    def __init__(
        self, journal: Journal | None = None, held: Mapping[CallKey, Sites] | None = None
    ) -> None:
        self._journal = journal
        self._calls: dict[CallKey, Sites] = dict(held or {})

    @property
    def keys(self) -> tuple[CallKey, ...]:
        """The calls there are."""
        return tuple(self._calls)

    def __contains__(self, key: object) -> bool:
        """Whether a call was measured."""
        return key in self._calls

    def add(self, key: CallKey, sites: Sites) -> None:
        """Keep what was measured in a call."""
        if self._journal is not None:
            self._journal.append(str(key), {"sites": [site.to_dict() for site in sites]})
        self._calls[key] = sites

    def of(self, keys: Iterable[CallKey]) -> dict[CallKey, Sites]:
        """Return what was measured in some calls, in the order of their keys."""
        return {key: self._calls[key] for key in sorted(keys)}


@contextmanager
def open_entries(
    path: str | Path | None, candidates: tuple[MechanismConfig, ...], rows: int
) -> Iterator[Entries]:
    """Go on with a journal, begin one, or keep everything in memory.

    Args:
        path: The journal's file, or None.
        candidates: What is measured; a journal holds measurements of one list of candidates.
        rows: The rows that the captured mass is taken from, likewise.

    Raises:
        CalibrationError: if the journal is damaged, no journal, or of another run.
    """
    if path is None:
        yield Entries()
        return
    header = {"candidates": [config.to_dict() for config in candidates], "rows": rows}
    with Journal.open(path, header) as journal:
        yield Entries(journal, _read(Path(path), journal))


def _read(path: Path, journal: Journal) -> dict[CallKey, Sites]:
    """Return what a journal holds, whose lines are whole."""
    held: dict[CallKey, Sites] = {}
    for line, (key, body) in enumerate(journal.entries(), start=2):  # the header is the first
        try:
            held[CallKey.parse(key)] = tuple(map(SiteErrors.from_dict, body["sites"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            expected = "what a calibration wrote"
            raise refusal(path, "journal", reason_of(error), expected, line) from None
    return held
