"""The page as a whole: sections in their order, style, script and the report as data."""

from __future__ import annotations

from importlib import metadata
from importlib import resources

from compiled_sparse.reasons import REASONS
from compiled_sparse.report import Report
from compiled_sparse.report_page.densities import density_map
from compiled_sparse.report_page.markup import Markup
from compiled_sparse.report_page.markup import element
from compiled_sparse.report_page.markup import joined
from compiled_sparse.report_page.markup import json_script
from compiled_sparse.report_page.patterns import pattern_figures
from compiled_sparse.report_page.table import headline
from compiled_sparse.report_page.table import site_table

PAGE_VERSION = 1

# The browser itself refuses what would need the network, whatever a report holds.
_CONTENT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def document(report: Report) -> str:
    """Return the page of a report: the same report, the same text.

    Raises:
        MissingExtraError: if there is a pattern to draw and matplotlib is not installed.
    """
    title = f"Attention report: {report.num_sparse} of {len(report.sites)} calls sparse"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_CONTENT_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=_generator()),
        element("title", title),
        element("style", _resource("page.css")),
    )
    body = element(
        "body",
        _stripes(),
        _header(report),
        _main(report),
        _footer(),
        json_script(report.to_dict(), "report"),
        element("script", _resource("page.js")),
    )
    root = element("html", head, "\n", body, lang="en", data_page_version=PAGE_VERSION)
    return f"<!DOCTYPE html>\n{root}\n"


def _header(report: Report) -> Markup:
    return element(
        "header",
        element("h1", "Attention report"),
        element("p", report.summary(), class_="summary"),
        headline(report),
    )


def _main(report: Report) -> Markup:
    sections = [_section("Calls", "calls", site_table(report))]
    if report.strict_problems:
        problems = _list(report.strict_problems, "problems")
        sections.append(_section("What strict=True would raise", "strict", problems))
    reasons = list(dict.fromkeys(site.reason for site in report.sites if site.reason))
    if reasons:
        sections.append(_section("Why calls stay dense, and what to do", "reasons", _why(reasons)))
    if report.notes():
        sections.append(_section("Notes", "notes", _list(report.notes())))
    if report.sites:
        sections.append(_section("Density", "density", density_map(report)))
        sections.append(_section("Patterns", "patterns", pattern_figures(report)))
    return element("main", joined(sections, "\n"))


def _section(title: str, identifier: str, content: Markup) -> Markup:
    heading = element("h2", title, id=f"{identifier}-title")
    return element(
        "section", heading, content, id=identifier, aria_labelledby=f"{identifier}-title"
    )


def _list(lines: list[str] | tuple[str, ...], kind: str = "") -> Markup:
    return element("ul", *(element("li", line) for line in lines), class_=kind or "plain")


def _why(reasons: list[str]) -> Markup:
    items = [
        joined([element("dt", element("code", reason)), element("dd", REASONS[reason])])
        for reason in reasons
    ]
    return element("dl", *items, class_="reasons")


def _footer() -> Markup:
    text = (
        f"Written by {_generator()}. Density: counted, the fraction of (query, key) pairs really "
        "attended; tiles that are selected by content count with their mean size. Gain: predicted "
        "from the density, never measured. A star marks a dynamic length. The report as JSON is "
        'in this page, in the element with id "report".'
    )
    return element("footer", element("p", text))


def _generator() -> str:
    return f"compiled_sparse {metadata.version('compiled-sparse')}"


def _stripes() -> Markup:
    """The pattern that bars of dense calls are filled with."""
    line = element("path", d="M0 0V4", stroke="currentColor", stroke_width=2)
    pattern = element(
        "pattern",
        line,
        id="stripes",
        width=4,
        height=4,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    return element("svg", pattern, width=0, height=0, class_="definitions", aria_hidden="true")


def _resource(name: str) -> Markup:
    return Markup(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
