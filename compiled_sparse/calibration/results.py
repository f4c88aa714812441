"""Measurements as files: one JSON document with a version and a checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiled_sparse.calibration.documents import checked_document
from compiled_sparse.calibration.documents import reason_of
from compiled_sparse.calibration.documents import refusal
from compiled_sparse.calibration.documents import with_checksum
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.measurements import CallKey
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.calibration.measurements import SiteErrors
from compiled_sparse.config import MechanismConfig

FORMAT = "compiled_sparse measurements"
VERSION = 1


def save_measurements(measurements: Measurements, path: str | Path) -> None:
    """Write measurements to a file, whole or not at all.

    The same measurements give the same bytes.

    Args:
        measurements: What to write.
        path: Where to; a file that is there is replaced.

    Raises:
        CalibrationError: if it cannot be written.
    """
    calls = {
        str(key): [site.to_dict() for site in measurements.calls[key]]
        for key in sorted(measurements.calls)
    }
    candidates = [config.to_dict() for config in measurements.candidates]
    document = {"format": FORMAT, "version": VERSION, "candidates": candidates, "calls": calls}
    plain = json.loads(json.dumps(document))  # tuples become lists, as a reader will see them
    write_atomically(path, json.dumps(with_checksum(plain)) + "\n")


def load_measurements(path: str | Path) -> Measurements:
    """Read what `save_measurements` wrote.

    Args:
        path: The file.

    Raises:
        CalibrationError: if the file is damaged, of another format or version, or holds no
            measurements; names the file and the reason.
        ConfigFormatError: if it cannot be read.
    """
    document = checked_document(path, FORMAT, (VERSION,))
    try:
        return _read(document["candidates"], document["calls"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise refusal(path, FORMAT, reason_of(error), "what save_measurements wrote") from None


def _read(
    candidates: list[Mapping[str, Any]], calls: Mapping[str, list[Mapping[str, Any]]]
) -> Measurements:
    return Measurements(
        candidates=tuple(map(MechanismConfig.from_dict, candidates)),
        calls={
            CallKey.parse(key): tuple(map(SiteErrors.from_dict, sites))
            for key, sites in calls.items()
        },
    )
