"""What the page of a report says, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import json
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pages import GRID
from pages import SMALL
from pages import TABLE
from pages import Node
from pages import dense
from pages import embedded
from pages import parsed
from pages import sparse

import compiled_sparse as cs
from compiled_sparse.errors import MissingExtraError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.reasons import REASONS
from compiled_sparse.report import Report
from compiled_sparse.report_page.densities import densities

HOSTILE = "</script><script>alert(\"x\")</script><b title='y'>&amp;"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return SMALL.to_html(tmp_path_factory.mktemp("page") / "report.html").read_text("utf-8")


def texts(nodes: list[Node]) -> list[str]:
    return [" ".join(node.text.split()) for node in nodes]


def test_the_page_is_well_formed_and_says_what_it_is(page: str) -> None:
    root = parsed(page)
    (html,) = root.all("html")
    assert html.attributes["lang"] == "en"
    assert texts(root.all("title"))[0] == "Attention report: 2 of 4 calls sparse"
    assert texts(root.all("h1")) == ["Attention report"]
    identifiers = [n.attributes["id"] for n in root.everything() if "id" in n.attributes]
    assert len(set(identifiers)) == len(identifiers)


def test_every_cell_of_the_rows_is_in_the_table(page: str) -> None:
    table = parsed(page).by_id("sites")
    rows = SMALL.rows()
    body = table.all("tbody")[0].all("tr")
    assert len(body) == len(rows) == 4
    for row, shown in zip(rows, body, strict=True):
        cells = texts([cell for cell in shown.children if cell.name in ("th", "td")])
        marks = {"sparse": "● sparse", "dense": "○ dense"}
        assert cells == [marks.get(text, text) for text in row.values()]
    headers = table.all("thead")[0].all("th")
    assert all(header.attributes["scope"] == "col" for header in headers)
    assert {"density, counted", "gain, predicted"} <= set(texts(headers))
    assert all(row.all("th")[0].attributes["scope"] == "row" for row in body)


def test_headline_reasons_schedules_and_strict_problems_are_shown(page: str) -> None:
    text = " ".join(parsed(page).text.split())
    assert SMALL.summary() in text
    assert "1.6x to 3.2x" in text
    assert "predicted, not measured" in text
    for reason in ("cross_attention", "causal"):
        assert REASONS[reason] in text
    for line in (*SMALL.notes(), *SMALL.strict_problems):
        assert line in text


def test_the_report_is_in_the_page_as_json_with_versions(page: str) -> None:
    assert embedded(page) == json.loads(SMALL.to_json())
    (html,) = parsed(page).all("html")
    assert html.attributes["data-page-version"] == "1"


def test_each_layout_of_a_mechanism_has_one_picture_with_a_text(tmp_path: Path) -> None:
    sites = (
        sparse("a.0"),
        sparse("a.1"),
        sparse("b", text_before=5),
        sparse("c", cs.SWBA(block=64, window=2), grid_thw=(210,)),
    )
    root = parsed(Report(sites).to_html(tmp_path / "r.html").read_text("utf-8"))
    pictures = root.all("img")
    assert len(pictures) == 3
    for picture in pictures:
        kind, _, data = str(picture.attributes["src"]).partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    alternatives = [str(picture.attributes["alt"]) for picture in pictures]
    assert "Sliding tile attention" in alternatives[0]
    assert "5 of them text" in alternatives[1]
    assert "of a.0, a.1." in texts(root.all("figcaption"))[0]


def test_a_pattern_that_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    sites = (sparse("a", cs.STA(tile_thw=(1, 1, 1)), grid_thw=(6, 20, 50)),)
    page = Report(sites).to_html(tmp_path / "r.html").read_text("utf-8")
    assert "Not drawn: too many blocks to draw (6000 blocks" in parsed(page).text


def test_a_report_without_configs_draws_by_the_spec_strings(tmp_path: Path) -> None:
    table = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 4))
    sites = (sparse("a"), sparse("b", table))
    root = parsed(
        Report(tuple(replace(site, config=None) for site in sites))
        .to_html(tmp_path / "r.html")
        .read_text("utf-8")
    )
    assert len(root.all("img")) == 1
    assert "Not drawn: " in root.text


def test_a_report_without_calls_has_a_page_and_needs_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for report in (Report(()), Report((dense("a"),))):
        page = report.to_html(tmp_path / "r.html").read_text("utf-8")
        assert report.summary() in parsed(page).text


def test_the_density_map_has_a_bar_per_call_as_long_as_its_density(page: str) -> None:
    bars = parsed(page).by_id("density").all("tbody")[0].all("tr")
    assert [texts(bar.all("th"))[0] for bar in bars] == [site.path for site in SMALL.sites]
    filled = [bar.all("rect")[0].attributes for bar in bars]
    assert [each["width"] for each in filled] == ["25.00%", "100.00%", "50.00%", "100.00%"]
    assert [each["class"] for each in filled] == ["sparse", "dense", "sparse", "dense"]


def test_a_table_of_windows_is_mapped_by_step_and_by_head(tmp_path: Path) -> None:
    config = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 4))
    layout = BlockLayout(GRID, (2, 3, 4))
    low, high = (sta_density(layout, (window,)) for window in TABLE.windows)
    site = sparse("b.1", config, layer=1)
    assert densities(site) == ((low, low, high), (low, high, low))
    report = Report((sparse("b.0", config, layer=0, schedule="dense at step 0"), site))
    root = parsed(report.to_html(tmp_path / "r.html").read_text("utf-8"))
    by_step, by_head = [s for s in root.all("table") if s.text.startswith("Density by")]
    assert "steps 0 to 1" in by_step.text
    assert "What the schedule keeps dense" in by_step.text
    assert "Of a table of windows it is the mean" in root.by_id("density").text
    assert "heads 0 to 2" in by_head.text
    cells = by_head.all("tbody")[0].all("tr")[1].all("rect")
    means = (low, (low + high) / 2, (low + high) / 2)
    assert texts(cells) == [f"head {i}: {mean:.3f}" for i, mean in enumerate(means)]


def test_a_window_per_head_is_mapped_by_head_alone() -> None:
    site = sparse("a", cs.STA(window_thw=((1, 1, 1), (3, 3, 3)), tile_thw=(2, 3, 4)))
    (of_heads,) = densities(site)
    assert of_heads[0] < of_heads[1]


def test_layers_of_a_table_are_not_guessed() -> None:
    site = sparse("a", cs.STA(window_thw=TABLE, tile_thw=(2, 3, 4)), layer=None)
    assert densities(site) == ()
    one_layer = cs.WindowTable(windows=TABLE.windows, choice=[[[0]], [[1]]])
    known = replace(site, config=cs.STA(window_thw=one_layer, tile_thw=(2, 3, 4)))
    assert len(densities(known)) == 2


def test_what_comes_from_the_model_is_escaped(tmp_path: Path) -> None:
    sites = (
        sparse(HOSTILE, schedule=HOSTILE),
        replace(sparse("b"), mechanism=HOSTILE, config=None),
        dense("c", "causal", detail=HOSTILE, kind=HOSTILE, mask=HOSTILE),
    )
    report = Report(sites, strict_problems=(HOSTILE,))
    page = report.to_html(tmp_path / "r.html").read_text("utf-8")
    root = parsed(page)
    assert len(root.all("script")) == 2
    assert not root.all("b")
    assert embedded(page) == json.loads(report.to_json())
    assert root.text.count('alert("x")') >= 6
    assert texts(root.by_id("sites").all("code"))[0] == HOSTILE


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    root = parsed(page)
    for node in root.everything():
        assert node.name not in ("link", "iframe", "object", "embed", "base", "audio", "video")
        for name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            value = node.attributes.get(name)
            assert value is None or value.startswith("data:image/png;base64,")
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"]*", "", page))
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#stripes"}
    policies = [n.attributes for n in root.all("meta") if "http-equiv" in n.attributes]
    assert "default-src 'none'" in str(policies[0]["content"])


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (SMALL.to_html(tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


def test_the_page_replaces_an_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    target.parent.mkdir()
    target.write_text("old")
    report = Report((dense("a"),))
    assert report.to_html(str(target)) == target
    assert target.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert list(target.parent.iterdir()) == [target]
    assert stat.S_IMODE(target.stat().st_mode) & stat.S_IRGRP


def test_a_page_that_cannot_be_put_in_its_place_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        Report((dense("a"),)).to_html(target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_matplotlib_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"compiled_sparse\[plots\]"):
        SMALL.to_html(tmp_path / "new" / "report.html")
    assert not list(tmp_path.iterdir())
