"""The documentation is true: snippets run, links lead somewhere, tables are complete."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from measured import measured

from compiled_sparse import cli
from compiled_sparse import config
from compiled_sparse import registry
from compiled_sparse import selector
from compiled_sparse.calibration import save_measurements
from compiled_sparse.config import STA
from compiled_sparse.config import SWBA
from compiled_sparse.environment import ALIASES
from compiled_sparse.plan_configs import SPARSITY
from compiled_sparse.quality import LEVELS
from compiled_sparse.reasons import EXPECTED_DENSE
from compiled_sparse.reasons import REASONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
API = DOCS / "api"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
README, START, REPORT, ENVIRONMENT, STA_PAGE, SWBA_PAGE, POLICY_PAGE, MIGRATION = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("start", "report", "environment", "sta", "swba", "policy", "migration")
    ),
)
MECHANISMS = ROOT / "docs" / "mechanisms.md"
PLAN = ROOT / "docs" / "plan.md"
RECIPES = DOCS / "recipes.md"  # its blocks are `py`, run by tests/models/test_recipes.py
OTHER_LANGUAGES = {"sh", "toml"}


@cache
def snippets(page: Path) -> list[tuple[int, str]]:
    """All python blocks of a page, each with the number of the line in front of it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def name_of(page: Path) -> str:
    """Where a page is in the repository."""
    return str(page.relative_to(ROOT))


def languages(page: Path) -> list[str]:
    """The languages of all fenced blocks of a page, however they are indented or quoted."""
    fences = re.findall(r"^[ >]*(?:```|~~~)+ *(.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert not any(fences[1::2]), f"{page.name}: a block ends with something behind its fence"
    return fences[::2]


def execute(page: Path, line: int, source: str, namespace: dict[str, Any]) -> None:
    """Run a block so that a traceback shows the line of the page."""
    code = compile("\n" * line + source, str(page), "exec", dont_inherit=True)
    exec(code, namespace)


def table_rows(page: Path, first_cell: str) -> list[tuple[str, ...]]:
    """The body of the markdown table whose header starts with a cell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return rows


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, marks=() if page in (README, START) else pytest.mark.slow, id=name_of(page)
        )
        for page in PAGES
        if snippets(page)
    ],
)
def test_every_snippet_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_mechanisms", dict(registry._mechanisms))  # pages may add some
    namespace: dict[str, Any] = {}
    if page != START:  # the pages say that `model` and `inputs` are those of the start page
        execute(START, *snippets(START)[0], namespace)
    for line, source in snippets(page):
        execute(page, line, source, namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_python_is_one_that_is_run(page: Path) -> None:
    found = [language for language in languages(page) if language not in OTHER_LANGUAGES]
    if page == RECIPES:
        assert set(found) == {"py"}
    else:
        assert found == ["python"] * len(snippets(page))


def test_the_readme_fits_one_screen_and_shows_six_lines_of_code() -> None:
    ((_, source),) = snippets(README)
    assert len(source.replace("\n\n", "\n").splitlines()) == 6
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 70


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(linked), f"{page.name} links to {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    pages = {page for page in PAGES if page != README and page.parent != API} | {API / "index.md"}
    assert {name for name in map(name_of, pages) if f"({name})" not in text} == set()


def test_every_page_of_names_is_linked_from_their_first_page() -> None:
    text = (API / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES if page.parent == API} - {"index.md"}
    assert {name for name in pages if f"({name})" not in text} == set()


def test_the_report_page_lists_every_reason_code_with_its_meaning() -> None:
    listed = {code.strip("`"): meaning for code, meaning in table_rows(REPORT, "code")}
    assert listed == REASONS


def test_the_report_page_names_the_reasons_nobody_is_warned_about() -> None:
    text = " ".join(REPORT.read_text(encoding="utf-8").split())
    sentence = re.search(r"Expected, and therefore not warned about: (.*?)\.", text)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == EXPECTED_DENSE


def test_the_environment_page_lists_every_variable_the_package_reads() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "compiled_sparse").rglob("*.py")
    )
    names = set(re.findall(r"""(?:environ\.get\(|environ\[|getenv\()"(\w+)\"""", sources))
    constants = set(re.findall(r"(?:environ\.get\(|environ\[|getenv\()([A-Z_]+)", sources))
    for constant in constants:
        names |= set(re.findall(rf'^{constant}\b.*= "(\w+)"$', sources, re.MULTILINE))
    text = ENVIRONMENT.read_text(encoding="utf-8")
    assert {"CXX", "COMPILED_SPARSE_CPU_KERNEL", "COMPILED_SPARSE_CACHE_DIR"} <= names
    assert all(name in text for name in names), names


def test_numbers_in_prose_are_those_of_the_code() -> None:
    start = START.read_text(encoding="utf-8")
    assert f"at least {selector.AUTO_MIN_TOKENS:,} tokens" in start
    assert f"{selector.KERNEL_EFFICIENCY} / density" in REPORT.read_text(encoding="utf-8")
    defaults = {name.strip("`"): value for name, _, value in table_rows(STA_PAGE, "parameter")}
    assert defaults == {
        "window_thw": f"`{STA().window_thw}`",
        "tile_thw": f"`{STA().tile_thw}`",
    }
    defaults = {name.strip("`"): value for name, _, value in table_rows(SWBA_PAGE, "parameter")}
    assert defaults == {"block": f"`{SWBA().block}`", "window": f"`{SWBA().window}`"}


def test_the_policy_page_shows_the_numbers_of_the_quality_levels() -> None:
    rows = {row[0].strip("`"): row[1:] for row in table_rows(POLICY_PAGE, "level")}
    assert rows == {
        name: (
            str(level.config.window_fraction),
            str(level.dense_first_steps),
            str(level.dense_first_layers),
            str(level.config.min_gain),
        )
        for name, level in LEVELS.items()
    }


def test_the_plan_page_shows_the_shares_that_the_code_counts() -> None:
    table = runpy.run_path(str(ROOT / "tools" / "share_table.py"))
    assert table_rows(PLAN, table["TITLES"][0]) == table["rows"]()
    assert f"sparsity of {SPARSITY}" in PLAN.read_text(encoding="utf-8")


def plan_page_commands() -> list[str]:
    """The arguments of each `compiled-sparse plan` on its page."""
    text = PLAN.read_text("utf-8")
    return re.findall(r"^compiled-sparse (plan .*?) *(?:#.*)?$", text, re.MULTILINE)


@pytest.mark.parametrize("command", plan_page_commands())
def test_a_command_of_the_plan_page_succeeds(command: str) -> None:
    assert cli.main(command.split()) == 0


def test_the_pages_list_every_name_of_fastvideo() -> None:
    rows = {name.strip("`"): text for name, text in table_rows(MIGRATION, "FastVideo's name")}
    assert {name: text.split("`")[1] for name, text in rows.items()} == ALIASES
    known = config.known_mechanisms()
    assert all(("not in this release" in rows[n]) == (m not in known) for n, m in ALIASES.items())
    assert all(f"`{name}`" in ENVIRONMENT.read_text(encoding="utf-8") for name in ALIASES)


def test_the_readme_says_of_no_mechanism_that_it_works_before_it_does() -> None:
    rows = table_rows(README, "mechanism")
    working = {name.split("`")[1] for name, *cells in rows if "planned" not in cells}
    assert working == {"Dense", *(each.config.__name__ for each in registry.mechanisms())}


def test_the_eager_example_agrees_with_the_reference() -> None:
    errors = runpy.run_path(str(ROOT / "examples" / "eager_attention.py"))["main"]()
    assert len(errors) == 5
    assert max(errors.values()) < 1e-4


def test_the_compiled_example_agrees_with_the_reference(fresh_compiler: None) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "wan_compiled.py"))["main"]
    assert main(inner="eager") < 1e-5


@pytest.mark.slow
def test_the_compiled_example_runs_with_inductor(fresh_compiler: None) -> None:
    assert runpy.run_path(str(ROOT / "examples" / "wan_compiled.py"))["main"]() < 1e-5


def test_the_schedule_example_starts_at_dense_attention(
    fresh_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "regional_schedule.py"))["main"]
    assert main(inner="eager") < 1e-5
    printed = capsys.readouterr().out
    far = [float(error) for error in re.findall(r"step [12]: (\S+) from dense", printed)]
    assert min(far) > 1e-3


def plot_commands() -> list[str]:
    """The arguments of each plot command on the page of mechanisms."""
    return re.findall(
        r"^`compiled-sparse (plot [^`]*)`$", MECHANISMS.read_text("utf-8"), re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", plot_commands())
def test_a_plot_command_of_the_mechanisms_page_draws(command: str, tmp_path: Path) -> None:
    assert cli.main([*command.split(), "--output", str(tmp_path / "pattern.png")]) == 0
    assert (tmp_path / "pattern.png").stat().st_size > 10_000


def report_page_plots() -> list[str]:
    """The arguments of each plot command on the page of the report."""
    return re.findall(r"^compiled-sparse (plot .*)$", REPORT.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", report_page_plots())
def test_a_plot_command_of_the_report_page_draws_its_picture(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_measurements(measured(), "measured.json")
    assert cli.main(command.split()) == 0
    picture = command.split()[-1]
    assert (tmp_path / picture).stat().st_size > 10_000
    assert f"(images/{picture})" in REPORT.read_text("utf-8")
    assert (REPORT.parent / "images" / picture).stat().st_size < 100_000


def test_the_report_page_draws_an_order_a_policy_and_measurements() -> None:
    assert [command.split()[1] for command in report_page_plots()] == [
        "--order",
        "--policy",
        "--measurements",
    ]


def test_the_mechanisms_page_has_a_section_and_a_picture_of_every_mechanism() -> None:
    text = MECHANISMS.read_text(encoding="utf-8")
    pictures = set(re.findall(r"images/pattern_(\w+)\.png", text))
    names = {"dense", *(each.name for each in registry.mechanisms())}
    assert pictures >= names
    assert len(plot_commands()) == len(pictures)
    assert {name.split("`")[1].lower() for name, *_ in table_rows(MECHANISMS, "mechanism")} >= {
        name.replace("_", "") for name in names
    }
    for name in pictures:
        assert (MECHANISMS.parent / "images" / f"pattern_{name}.png").stat().st_size < 80_000
