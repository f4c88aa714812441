"""HTML from functions: what is not markup yet is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"img", "input", "meta"})


class Markup(str):
    """Text that is HTML already and goes into a page as it is."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | bool) -> Markup:
    """Return an element.

    Args:
        name: The tag's name.
        *children: `Markup`, or plain text, which is escaped.
        **attributes: Their names without a trailing underscore, other underscores as hyphens; True
            for one without a value, False for none.
    """
    start = f"<{name}{''.join(_attribute(k, v) for k, v in attributes.items())}>"
    if name in _VOID:
        return Markup(start)
    return Markup(f"{start}{joined(children)}</{name}>")


def joined(parts: Iterable[str], separator: str = "") -> Markup:
    """Return parts one after the other; plain text is escaped."""
    return Markup(separator.join(map(_escaped, parts)))


def json_script(document: Any, identifier: str) -> Markup:
    """Return a script element that holds JSON values and nothing that could end it."""
    text = json.dumps(document, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", Markup(text), type="application/json", id=identifier)


def _escaped(part: str) -> str:
    return part if isinstance(part, Markup) else html.escape(part)


def _attribute(name: str, value: str | float | bool) -> str:
    name = name.removesuffix("_").replace("_", "-")
    if value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
