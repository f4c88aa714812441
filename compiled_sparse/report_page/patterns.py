"""Pictures of the patterns that a report's sparse calls have."""

from __future__ import annotations

import base64

from compiled_sparse.config import STA
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import UnknownMechanismError
from compiled_sparse.layout import Text
from compiled_sparse.plots import pattern_picture
from compiled_sparse.plots.words import times
from compiled_sparse.report import Decision
from compiled_sparse.report import Report
from compiled_sparse.report_page.markup import Markup
from compiled_sparse.report_page.markup import element
from compiled_sparse.report_page.markup import joined

_NOT_DRAWN = (ConfigError, ConfigFormatError, LayoutError, UnknownMechanismError)
_MOST_NAMES = 3


def pattern_figures(report: Report) -> Markup:
    """Return one figure for each mechanism on each layout.

    Raises:
        MissingExtraError: if there is a pattern to draw and matplotlib is not installed.
    """
    groups: dict[object, list[Decision]] = {}
    for site in report.sites:
        if site.is_sparse and site.grid_thw is not None:
            key = (site.mechanism, site.config, site.grid_thw, site.text_before, site.text_after)
            groups.setdefault(key, []).append(site)
    if not groups:
        return element("p", "No call is sparse, so there is no pattern to show.")
    return joined([_figure(sites) for sites in groups.values()], "\n")


def _figure(sites: list[Decision]) -> Markup:
    site = sites[0]
    grid, text = site.grid_thw or (), Text(site.text_before, site.text_after)
    caption = [
        element("code", site.mechanism),
        f" on grid {times(grid)}",
        f" with {text.before}+{text.after} text tokens" if text != Text() else "",
        f", of {_names(sites)}.",
    ]
    try:
        config = site.config or parse_spec(site.mechanism)
        picture = pattern_picture(config, grid, text)
    except _NOT_DRAWN as error:
        shown = element("p", f"Not drawn: {error.problem} ({error.got}).", class_="notice")
        note = ""
    else:
        data = base64.b64encode(picture.png).decode("ascii")
        source = f"data:image/png;base64,{data}"
        shown = element("img", src=source, alt=f"Attention pattern. {picture.title}")
        note = _note(config)
    return element("figure", shown, element("figcaption", *caption, note))


def _note(config: MechanismConfig) -> str:
    if config.table is not None:
        return " Drawn: step 0, layer 0, head 0 of the table."
    if isinstance(config, STA) and len(config.windows) > 1:
        return " Drawn: head 0; each head has a window of its own."
    return ""


def _names(sites: list[Decision]) -> str:
    paths = list(dict.fromkeys(site.path or "(no module)" for site in sites))
    names = ", ".join(paths[:_MOST_NAMES])
    rest = len(paths) - _MOST_NAMES
    return f"{names} and {rest} more" if rest > 0 else names
