"""A real browser without a window: what it makes of a page, and what it complains about."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_LIMIT_S = 120
_VIRTUAL_MS = 3000  # the browser's own clock: timers up to here have run


def find_browser() -> str:
    """Return the path of a browser; there being none fails the test."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(f"none of {', '.join(NAMES)} is on PATH. Next: make browser")
    return found


def rendered(page: Path, profile: Path, fragment: str = "", width: int = 1200) -> tuple[str, str]:
    """Return the page's DOM after its scripts ran, and what was written to its console."""
    done = _run(
        page, profile, fragment, width, f"--virtual-time-budget={_VIRTUAL_MS}", "--dump-dom"
    )
    return done.stdout, "\n".join(re.findall(r".*:CONSOLE.*", done.stderr))


def screenshot(page: Path, profile: Path, target: Path, *, dark: bool) -> None:
    """Write a picture of the page, as a reader sees it who prefers light or dark pages."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(page, profile, "", 1200, scheme, f"--screenshot={target}")


def _run(
    page: Path, profile: Path, fragment: str, width: int, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [
        find_browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--proxy-server=127.0.0.1:9",  # nobody answers there
        "--proxy-bypass-list=<-loopback>",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={profile}",
        f"--window-size={width},2000",
        *arguments,
        page.as_uri() + fragment,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done
