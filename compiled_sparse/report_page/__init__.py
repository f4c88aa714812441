"""A report as one HTML page: no other file, no request, no library.

`Report.to_html` is its public face.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compiled_sparse.report import Report
from compiled_sparse.report_page.document import document

__all__ = ["write_page"]

_PERMISSIONS = 0o644  # a temporary file is its owner's alone


def write_page(report: Report, path: str | Path) -> Path:
    """Write the page of a report; see `Report.to_html`.

    The file appears whole or not at all: it is written beside its place and then moved there.
    """
    text = document(report)
    target = Path(path).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        temporary.chmod(_PERMISSIONS)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
