"""The page of a report in a real browser: its script, its requests, its looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import rendered
from browser import screenshot
from matplotlib.image import imread
from pages import SMALL
from pages import TABLE
from pages import parsed
from pages import sparse

import compiled_sparse as cs
from compiled_sparse.report import Report

pytestmark = pytest.mark.slow

WIDE = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 4))

# Asked of the page by a script in a page around it; a frame is as narrow as it is told to be.
FRAME = """<!DOCTYPE html><html><body style="margin: 0">
<iframe src="report.html#{fragment}" style="border: 0; width: {width}px; height: 2000px"></iframe>
<pre id="answer"></pre>
<script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe").contentWindow;
  const page = frame.document;
  const answer = (() => {{ {question} }})();
  document.getElementById("answer").textContent = JSON.stringify(answer);
}});
</script></body></html>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sites = (*SMALL.sites, sparse("table.0.attn", WIDE, layer=0), sparse("x" * 90, density=0.03))
    report = Report(sites, strict_problems=SMALL.strict_problems)
    return report.to_html(tmp_path_factory.mktemp("page") / "report.html")


def ask(page: Path, profile: Path, question: str, *, width: int = 1200, fragment: str = "") -> str:
    frame = page.parent / "frame.html"
    frame.write_text(FRAME.format(question=question, width=width, fragment=fragment))
    dom, console = rendered(frame, profile)
    assert not console
    return parsed(dom).by_id("answer").text


def shown_rows(dom: str) -> list[str]:
    rows = parsed(dom).by_id("sites").all("tbody")[0].all("tr")
    return [row.all("th")[0].text for row in rows if "hidden" not in row.attributes]


def test_the_script_runs_without_a_complaint_and_all_rows_are_there(
    page: Path, tmp_path: Path
) -> None:
    dom, console = rendered(page, tmp_path)
    root = parsed(dom)
    assert not console
    assert root.all("html")[0].attributes["data-script"] == "ready"
    assert "hidden" not in root.by_id("controls").attributes
    assert len(shown_rows(dom)) == 6
    assert len(root.by_id("sites").all("button")) == len(SMALL.rows()[0])


@pytest.mark.parametrize(
    ("fragment", "rows"),
    [
        ("#filter=dense", ["blocks.0.attn2", "refiner.attn"]),
        ("#filter=refiner", ["refiner.attn"]),
        ("#filter=nothing%20like%20it", []),
    ],
)
def test_the_address_filters_the_rows(
    fragment: str, rows: list[str], page: Path, tmp_path: Path
) -> None:
    dom, console = rendered(page, tmp_path, fragment)
    assert not console
    assert shown_rows(dom) == rows
    assert parsed(dom).by_id("count").text == f"{len(rows)} of 6 rows"


def test_a_column_of_numbers_is_sorted_by_value_and_then_the_other_way(
    page: Path, tmp_path: Path
) -> None:
    question = """
    const header = [...page.querySelectorAll("#sites thead th")]
      .find((each) => each.textContent === "density, counted");
    const column = () => [...page.querySelectorAll("#sites tbody tr")]
      .map((row) => Number(row.cells[header.cellIndex].textContent));
    const button = header.querySelector("button");
    button.click();
    const [up, sort] = [column(), header.getAttribute("aria-sort")];
    button.click();
    const sorted = (values) => values.every((each, i) => !i || values[i - 1] <= each);
    return [sorted(up), sort, sorted(column().reverse()), header.getAttribute("aria-sort"), up[0]];
    """
    assert ask(page, tmp_path, question) == '[true,"ascending",true,"descending",0.03]'


def test_typing_and_choosing_filter_the_rows(page: Path, tmp_path: Path) -> None:
    question = """
    const shown = () => page.querySelectorAll("#sites tbody tr:not([hidden])").length;
    const [text, choice] = [page.getElementById("text"), page.getElementById("decision")];
    const seen = [shown()];
    text.value = "ATTN";
    text.dispatchEvent(new Event("input"));
    seen.push(shown());
    choice.value = "sparse";
    choice.dispatchEvent(new Event("change"));
    return [...seen, shown()];
    """
    seen = [int(part) for part in ask(page, tmp_path, question).strip("[]").split(",")]
    assert seen[0] == 6
    assert seen[1] == 5
    assert 0 < seen[2] < seen[1]


@pytest.mark.parametrize("width", [390, 820, 1200])
def test_nothing_sticks_out_at_the_sides(width: int, page: Path, tmp_path: Path) -> None:
    question = """
    const root = page.documentElement;
    const isInside = (each) => each.closest(".scroll, svg, thead")
      || each.getBoundingClientRect().right <= root.clientWidth + 1;
    const out = [...page.querySelectorAll("main *")].filter((each) => !isInside(each));
    return [root.clientWidth, root.scrollWidth, out.map((each) => each.outerHTML.slice(0, 80))];
    """
    assert ask(page, tmp_path, question, width=width) == f"[{width},{width},[]]"


def test_the_browser_loads_nothing_but_the_page(page: Path, tmp_path: Path) -> None:
    question = """
    const loaded = frame.performance.getEntriesByType("resource").map((each) => each.name);
    return loaded.filter((name) => !name.startsWith("data:"));
    """
    assert ask(page, tmp_path, question) == "[]"


def test_what_a_page_should_not_do_would_be_seen(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = page.parent / "wrong.html"
    wrong.write_text(text.replace("<main>", '<main><img src="https://example.org/a.png">'))
    _, console = rendered(wrong, tmp_path)
    assert "Content Security Policy" in console
    wrong.write_text(text.replace('"use strict";', "noSuchName();"))
    dom, console = rendered(wrong, tmp_path)
    assert "noSuchName is not defined" in console
    assert "data-script" not in parsed(dom).all("html")[0].attributes


def test_without_its_script_the_page_shows_the_same_rows(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plain = page.parent / "plain.html"
    forbidden = text.replace("script-src &#x27;unsafe-inline&#x27;", "script-src &#x27;none&#x27;")
    assert forbidden != text
    plain.write_text(forbidden, encoding="utf-8")
    dom, _ = rendered(plain, tmp_path, "#filter=dense")
    root = parsed(dom)
    assert "data-script" not in root.all("html")[0].attributes
    assert "hidden" in root.by_id("controls").attributes
    assert len(shown_rows(dom)) == 6


def test_light_and_dark_pages_are_drawn(page: Path, tmp_path: Path) -> None:
    means = []
    for name, dark in (("light.png", False), ("dark.png", True)):
        screenshot(page, tmp_path / "profile", tmp_path / name, dark=dark)
        pixels = imread(tmp_path / name)[..., :3]
        assert pixels.shape[1] == 1200
        top = pixels[: pixels.shape[0] // 4]  # above the pictures, which are light in both
        assert top.std() > 0.05
        means.append(top.mean())
    light, dark_mean = means
    assert light > 0.8
    assert dark_mean < 0.3
