"""The table of calls, its filter, and the numbers above it."""

from __future__ import annotations

from compiled_sparse.report import Report
from compiled_sparse.report_page.markup import Markup
from compiled_sparse.report_page.markup import element
from compiled_sparse.report_page.markup import joined

_NUMBERS = ("heads", "q/k length", "density", "gain")
_HINTS = {"density": "density, counted", "gain": "gain, predicted"}
_CODE = ("site", "mechanism")
_MARKS = {"sparse": "\N{BLACK CIRCLE}", "dense": "\N{WHITE CIRCLE}"}


def headline(report: Report) -> Markup:
    """Return the numbers that sum a report up."""
    sparse = [site for site in report.sites if site.is_sparse]
    density = sum(site.density for site in sparse) / len(sparse) if sparse else 1.0
    gains = [site.predicted_gain for site in sparse]
    numbers = [
        (f"{len(sparse)} of {len(report.sites)}", "attention calls sparse"),
        (f"{density:.3f}" if sparse else "-", "density of the sparse calls: counted"),
        (_range(gains), "gain of a sparse call over dense: predicted, not measured"),
        (str(report.num_graphs), "graph" if report.num_graphs == 1 else "graphs: breaks between"),
    ]
    items = [element("div", element("dt", text), element("dd", number)) for number, text in numbers]
    return element("dl", *items, class_="headline")


def site_table(report: Report) -> Markup:
    """Return the table, one row per group of like calls, with what sorts and filters it."""
    rows = report.rows()
    if not rows:
        return element("p", "The model makes no attention call.")
    titles = list(rows[0])
    head = element("tr", *(_header(title) for title in titles), role="row")
    body = [_row(row) for row in rows]
    return joined(
        [
            _controls(len(rows)),
            element(
                "table",
                element("caption", "Calls that differ only in a number of their path share a row."),
                element("thead", head, role="rowgroup"),
                element("tbody", *body, role="rowgroup"),
                id="sites",
                role="table",
                class_="cards",
            ),
        ],
        "\n",
    )


def _range(gains: list[float]) -> str:
    if not gains:
        return "-"
    low, high = f"{min(gains):.1f}x", f"{max(gains):.1f}x"
    return low if low == high else f"{low} to {high}"


def _header(title: str) -> Markup:
    kind = "number" if title in _NUMBERS else "text"
    shown = _HINTS.get(title, title)
    return element("th", shown, scope="col", role="columnheader", class_=kind)


def _row(row: dict[str, str]) -> Markup:
    decision = row["decision"]
    cells = [_cell(title, text) for title, text in row.items()]
    return element("tr", *cells, role="row", class_=decision, data_decision=decision)


def _cell(title: str, text: str) -> Markup:
    content: str = text
    if title in _CODE and text != "-":
        content = element("code", text)
    if title == "decision":
        mark = element("span", _MARKS[text], aria_hidden="true", class_="mark")
        content = element("span", mark, f" {text}")
    if title == "site":
        return element("th", content, scope="row", role="rowheader", class_="text")
    number = {"class_": "number", "data_value": _value(text)} if title in _NUMBERS else {}
    # A column without anything to say takes no line of its own where rows are shown as cards.
    empty = text in ("", "-")
    return element(
        "td", content, role="cell", data_title=_HINTS.get(title, title), data_empty=empty, **number
    )


def _value(text: str) -> str:
    """What a column of numbers is sorted by: its first number, -1 where it has none."""
    digits = text.partition("/")[0].rstrip("x*")
    return digits if digits.replace(".", "", 1).isdigit() else "-1"


def _controls(num_rows: int) -> Markup:
    choices = [element("option", text, value=value) for value, text in _CHOICES]
    return element(
        "form",
        element("label", "Show ", element("select", *choices, id="decision")),
        element(
            "label", "Containing ", element("input", type="search", id="text", autocomplete="off")
        ),
        element("output", f"{num_rows} of {num_rows} rows", id="count", for_="decision text"),
        id="controls",
        hidden=True,
    )


_CHOICES = (("", "all calls"), ("sparse", "sparse calls"), ("dense", "dense calls"))
