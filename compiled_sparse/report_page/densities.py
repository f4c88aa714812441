"""The density of each call, and of each step and head where these have windows of their own."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence

from compiled_sparse.config import STA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.report import Decision
from compiled_sparse.report import Report
from compiled_sparse.report_page.markup import Markup
from compiled_sparse.report_page.markup import element
from compiled_sparse.report_page.markup import joined

Rows = Sequence[tuple[Decision, Sequence[float]]]

_SCALE = (0.0, 0.25, 0.5, 0.75, 1.0)
_FAINTEST = 0.06


def density_map(report: Report) -> Markup:
    """Return a bar per call in execution order, and maps of layers by steps and by heads."""
    by_step: list[tuple[Decision, Sequence[float]]] = []
    by_head: list[tuple[Decision, Sequence[float]]] = []
    for site in report.sites:
        table = densities(site)
        if len(table) > 1:
            by_step.append((site, [_mean(heads) for heads in table]))
        if table and len(table[0]) > 1:
            by_head.append((site, [_mean(head) for head in zip(*table, strict=True)]))
    parts = [_bars(report.sites)]
    if by_step:
        parts.append(_map(by_step, "step", "each the mean over the heads"))
    if by_head:
        parts.append(_map(by_head, "head", "each the mean over the steps"))
    return joined(parts, "\n")


def densities(site: Decision) -> tuple[tuple[float, ...], ...]:
    """Return the densities of a call, nested [steps][heads], a size of 1 where all are alike.

    Empty where the windows are not known: another mechanism, or a table with rows for layers and no
    telling which layer this is.
    """
    config = site.config
    if not isinstance(config, STA) or site.grid_thw is None:
        return ()
    table = config.table
    if table is not None and table.num_layers > 1 and site.layer is None:
        return ()
    tile = config.resolve_tile(site.grid_thw)
    layout = BlockLayout(site.grid_thw, tile, site.text_before, site.text_after)
    of_window = {window: sta_density(layout, (window,)) for window in config.windows}
    steps = range(1 if table is None else table.num_steps)
    rows = [config.at(step, site.layer).windows for step in steps]
    return tuple(tuple(of_window[window] for window in row) for row in rows)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _bars(sites: Sequence[Decision]) -> Markup:
    rows = [
        element("tr", _name(site), element("td", _bar(site)), _number(f"{site.density:.3f}"))
        for site in sites
    ]
    caption = (
        "Density of each call in execution order, counted. A bar with stripes is a dense call."
    )
    if any(site.config is not None and site.config.table is not None for site in sites):
        caption += " Of a table of windows it is the mean over its steps and layers."
    return _table(caption, rows, ("call", "0 to 1", "density"))


def _bar(site: Decision) -> Markup:
    title = element("title", f"{site.decision}, density {site.density:.3f}")
    width = f"{100 * site.density:.2f}%"
    filled = element("rect", width=width, height="100%", class_=site.decision)
    return element("svg", title, filled, role="img")


def _map(rows: Rows, unit: str, note: str) -> Markup:
    """One strip per call: a cell for each step or head, the darker the denser."""
    body = [
        element("tr", _name(site), element("td", _strip(values, unit)), _number(_range(values)))
        for site, values in rows
    ]
    most = max(len(values) for _, values in rows)
    caption = (
        f"Density by {unit}, counted: {unit}s 0 to {most - 1} from left to right, {note}; "
        "the stronger the denser."
    )
    if any(site.schedule for site, _ in rows):
        caption += " What the schedule keeps dense, see the notes, is not marked."
    return joined([_table(caption, body, ("call", f"{unit}s", "range")), _legend()], "\n")


def _strip(values: Sequence[float], unit: str) -> Markup:
    label = element("title", f"density from {min(values):.3f} to {max(values):.3f}")
    cells = [
        element(
            "rect",
            element("title", f"{unit} {index}: {value:.3f}"),
            x=index,
            width=1,
            height=1,
            fill_opacity=_opacity(value),
        )
        for index, value in enumerate(values)
    ]
    return element(
        "svg",
        label,
        *cells,
        viewBox=f"0 0 {len(values)} 1",
        preserveAspectRatio="none",
        shape_rendering="crispEdges",
        role="img",
        class_="strip",
    )


def _legend() -> Markup:
    swatches = [
        element(
            "span",
            element(
                "svg",
                element("rect", width=1, height=1, fill_opacity=_opacity(value)),
                viewBox="0 0 1 1",
                aria_hidden="true",
            ),
            f"{value:.2f}",
        )
        for value in _SCALE
    ]
    return element("p", "density ", *swatches, class_="legend")


def _opacity(density: float) -> str:
    return f"{_FAINTEST + (1 - _FAINTEST) * density:.3f}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _name(site: Decision) -> Markup:
    return element("th", element("code", site.path or "(no module)"), scope="row", class_="text")


def _number(text: str) -> Markup:
    return element("td", text, class_="number")


def _table(caption: str, rows: Sequence[Markup], titles: tuple[str, str, str]) -> Markup:
    first, middle, last = titles
    head = element(
        "tr",
        element("th", first, scope="col", class_="text"),
        element("th", middle, scope="col", class_="text"),
        element("th", last, scope="col", class_="number"),
    )
    table = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *rows),
        class_="map",
    )
    # It can be scrolled, so it can be reached by the keyboard.
    return element("div", table, class_="scroll", tabindex=0, role="group", aria_label=caption)
