"""The documentation as a site: complete, and made of nothing from elsewhere."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit

import browser
import pytest
import yaml

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse import distributed

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"}
_LOADING = ("src", "srcset", "poster", "data")
NOWHERE = "http://127.0.0.1:9"  # nobody answers there


def navigation(entries: list[Any]) -> list[str]:
    """Return the pages of a navigation, in order."""
    pages = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += navigation(target) if isinstance(target, list) else [target]
    return pages


def test_every_page_is_in_the_navigation_once_and_nothing_else() -> None:
    pages = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(pages) == sorted(written | OUTSIDE)


def places(module: Any) -> set[str]:
    """Return where the public names of a module are defined, those of modules among them too."""
    found = set()
    for name in module.__all__:
        value = getattr(module, name)
        found |= places(value) if inspect.ismodule(value) else {_place(value)}
    return found


def _place(value: Any) -> str:
    value = inspect.unwrap(value)
    return f"{value.__module__}.{value.__qualname__}"


def test_every_public_name_is_on_a_page() -> None:
    text = "\n".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    assert places(cs) | places(calibration) | places(distributed) <= set(documented)
    assert {"compiled_sparse.registry", "compiled_sparse.errors"} <= set(documented)


class _Tags(HTMLParser):
    """Where the elements of a page point: what it loads, and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self.linked: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name in _LOADING or (tag, name) == ("link", "href")):
                self.loaded.add(value)
            elif value and name == "href":
                self.linked.add(value)


def is_elsewhere(target: str) -> bool:
    """Tell whether a target is on another host."""
    return bool(urlsplit(target).netloc)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly and without a network."""
    target = tmp_path_factory.mktemp("site")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, **proxies, "no_proxy": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        loaded = _Tags(page).loaded
        assert loaded, page
        assert not {target for target in loaded if is_elsewhere(target)}, page
    for sheet in site.rglob("*.css"):
        targets = re.findall(r"(?:url\(|@import) *[\"']?([^\"')]*)", sheet.read_text("utf-8"))
        assert not {target for target in targets if is_elsewhere(target)}, sheet


@pytest.mark.slow
def test_every_link_between_the_pages_leads_to_a_file(site: Path) -> None:
    for page in set(site.rglob("*.html")) - {site / "404.html"}:  # served from any address
        tags = _Tags(page)
        for target in tags.linked | tags.loaded:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            assert (page.parent / unquote(parts.path)).is_file(), f"{page.name}: {target}"


@pytest.mark.slow
def test_files_outside_the_documentation_are_on_the_site(site: Path) -> None:
    for name in ("LICENSE", "examples/finetune_sla.py", "benchmarks/results/cpu_vmoba.json"):
        assert (site / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.slow
def test_a_documented_name_has_its_signature_and_docstring(site: Path) -> None:
    page = (site / "api" / "functions.html").read_text("utf-8")
    assert 'id="compiled_sparse.explain.explain"' in page
    assert "Report what the backend would do to each attention call of a model." in page


@pytest.mark.slow
def test_the_home_page_renders_without_a_complaint(site: Path, tmp_path: Path) -> None:
    dom, console = browser.rendered(site / "index.html", tmp_path / "profile")
    assert console == ""
    assert re.search(r"<html[^>]* class=\"js", dom)  # its script ran
    assert "Two commands" in dom
    assert 'href="start.html"' in dom
