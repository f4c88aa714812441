"""Hooks of mkdocs: pages that are read in the repository and on the site alike.

In the repository a page may link to a file outside ``docs/``, the root of the site. Each such file
goes into the site under its path in the repository, the README as the home page, and links are
rewritten to where their target is there. A folder becomes a page that lists its files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname
from posixpath import normpath
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.files import InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
HOME = "README.md"
_TARGET = re.compile(r"(?<=\]\()[^)\s#:]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the home page and all that pages link to outside ``docs/``, and what that links to."""
    pending = [HOME, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    known = set(pending)
    while pending:
        path = pending.pop()
        if not path.startswith("docs/"):
            files.append(_file(path, config))
        for target in _linked(path):
            if target not in known and not target.startswith("docs/"):
                known.add(target)
                pending.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites links between files of the repository into links between files of the site."""
    uri = page.file.src_uri
    source = f"docs/{uri}" if page.file.src_dir else uri

    def rewritten(match: re.Match[str]) -> str:
        target = normpath(f"{dirname(source)}/{match[0]}".lstrip("/"))
        if not (ROOT / target).exists():
            return match[0]  # mkdocs says so
        return relpath(_site_path(target), dirname(uri) or ".")

    return _TARGET.sub(rewritten, markdown)


def _linked(path: str) -> Iterator[str]:
    """Yields the paths in the repository that a page or a folder leads to."""
    if (ROOT / path).is_dir():
        yield from (f"{path}/{each.name}" for each in (ROOT / path).iterdir())
    elif path.endswith(".md"):
        for target in _TARGET.findall((ROOT / path).read_text(encoding="utf-8")):
            target = normpath(f"{dirname(path)}/{target}".lstrip("/"))
            if (ROOT / target).exists():
                yield target


def _site_path(path: str) -> str:
    """Returns where a file of the repository is in the site's sources."""
    return f"{path}/README.md" if (ROOT / path).is_dir() else path.removeprefix("docs/")


def _file(path: str, config: MkDocsConfig) -> File:
    if (ROOT / path).is_dir():
        names = sorted(each.name for each in (ROOT / path).iterdir())
        listing = "\n".join([f"# {path}", "", *(f"- [{name}]({name})" for name in names)])
        level = InclusionLevel.NOT_IN_NAV
        return File.generated(config, _site_path(path), content=listing, inclusion=level)
    return File.generated(config, path, abs_src_path=str(ROOT / path))
