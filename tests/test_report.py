"""Reports: the same decisions as text, as rows and as JSON."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
from pathlib import Path

import expecttest
from rich.console import Console

import compiled_sparse as cs
from compiled_sparse.reasons import EXPECTED_DENSE
from compiled_sparse.reasons import REASONS
from compiled_sparse.report import Decision
from compiled_sparse.report import Report


def sparse(path: str, **changes: object) -> Decision:
    site = Decision(
        path=path,
        kind="self",
        decision="sparse",
        mechanism="sta:window_thw=3x3x3,tile_thw=auto",
        query_shape=(2, 12, 32760, 128),
        key_shape=(2, 12, 32760, 128),
        dtype="bfloat16",
        grid_thw=(21, 30, 52),
        layout_origin="graph",
        density=0.25,
        predicted_gain=3.2,
    )
    return dataclasses.replace(site, **changes)


def dense(path: str, reason: str, **changes: object) -> Decision:
    site = Decision(
        path=path,
        kind="cross",
        decision="dense",
        reason=reason,
        query_shape=(2, 12, 32760, 128),
        key_shape=(2, 12, 512, 128),
        dtype="bfloat16",
    )
    return dataclasses.replace(site, **changes)


MIXED = Report(
    (
        sparse("blocks.0.attn1"),
        dense("blocks.0.attn2", "cross_attention"),
        sparse("blocks.1.attn1"),
        dense("blocks.1.attn2", "cross_attention"),
        sparse("blocks.7.attn1"),
        sparse("joint.attn", kind="joint", text_before=3, text_after=256, density=0.5),
        sparse("final.attn", dynamic=True),
        dense("", "layout_unknown", kind="self", detail="no grid", query_shape=(8, 64)),
    ),
    num_graphs=2,
)


class TestGoldens(expecttest.TestCase):
    """Accept an intended change with EXPECTTEST_ACCEPT=1."""

    def test_text_groups_like_calls_and_explains_each_reason(self) -> None:
        self.assertExpectedInline(
            str(MIXED),
            """\
5 of 8 attention calls sparse, density 0.300, 2 cross_attention, 1 layout_unknown, 2 graphs
site                            kind   heads  q/k length    grid      text   decision  mechanism                           density  gain  reason
blocks.{0,1,7}.attn1 (3 calls)  self   12     32760/32760   21x30x52  -      sparse    sta:window_thw=3x3x3,tile_thw=auto  0.250    3.2x
blocks.{0-1}.attn2 (2 calls)    cross  12     32760/512     -         -      dense     -                                   1.000    -     cross_attention
joint.attn                      joint  12     32760/32760   21x30x52  3+256  sparse    sta:window_thw=3x3x3,tile_thw=auto  0.500    3.2x
final.attn                      self   12     32760/32760*  21x30x52  -      sparse    sta:window_thw=3x3x3,tile_thw=auto  0.250    3.2x
(no module)                     self   -      8/512         -         -      dense     -                                   1.000    -     layout_unknown (no grid)
cross_attention: Keys are other tokens than the queries (text, image). Nothing to do.
layout_unknown: The token grid is not proven. Pass cs.metadata(grid_thw=(T, H, W)).""",  # noqa: E501 - as wide as the table
        )

    def test_a_report_without_calls_is_one_line(self) -> None:
        self.assertExpectedInline(str(Report(())), """0 of 0 attention calls sparse""")

    def test_the_summary_of_sparse_calls_only(self) -> None:
        self.assertExpectedInline(
            Report((sparse("a"), sparse("b"))).summary(),
            """2 of 2 attention calls sparse, density 0.250""",
        )


def test_json_holds_every_field_of_every_call() -> None:
    document = json.loads(MIXED.to_json())
    assert document["version"] == 1
    assert document["num_graphs"] == 2
    assert document["strict_problems"] == []
    names = {field.name for field in dataclasses.fields(Decision)} - {"config"}
    assert all(set(site) == names for site in document["sites"])
    assert json.loads(json.dumps(MIXED.to_dict())) == document


def test_json_gives_back_the_same_decisions() -> None:
    def as_tuples(site: dict) -> dict:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in site.items()}

    sites = [Decision(**as_tuples(site)) for site in json.loads(MIXED.to_json())["sites"]]
    assert Report(tuple(sites), num_graphs=2) == MIXED


def test_rows_have_the_same_columns_and_count_their_calls() -> None:
    rows = MIXED.rows()
    assert len({tuple(row) for row in rows}) == 1
    assert [row["site"] for row in rows] == [
        "blocks.{0,1,7}.attn1 (3 calls)",
        "blocks.{0-1}.attn2 (2 calls)",
        "joint.attn",
        "final.attn",
        "(no module)",
    ]
    assert MIXED.num_sparse == 5


def test_masks_have_a_column_where_there_are_any() -> None:
    masked = dataclasses.replace(sparse("b.attn"), mask="key_padding")
    assert "mask" not in Report((sparse("a.attn"),)).rows()[0]
    assert [row["mask"] for row in Report((sparse("a.attn"), masked)).rows()] == [
        "-",
        "key_padding",
    ]


def test_calls_that_differ_in_more_than_a_number_keep_their_own_rows() -> None:
    sites = (sparse("blocks.0.attn"), sparse("blocks.1.attn", density=0.3), sparse("single.0.attn"))
    assert len(Report(sites).rows()) == 3


def test_calls_at_one_path_share_a_row_with_their_count() -> None:
    rows = Report((sparse("blocks.3.attn"), sparse("blocks.3.attn"))).rows()
    assert [row["site"] for row in rows] == ["blocks.3.attn (2 calls)"]


def test_the_rich_table_shows_every_cell_and_reason() -> None:
    stream = io.StringIO()
    Console(file=stream, width=400).print(MIXED)
    shown = stream.getvalue()
    assert MIXED.summary() in shown
    for row in MIXED.rows():
        assert all(cell in shown for cell in row.values())
    for reason in ("cross_attention", "layout_unknown"):
        assert REASONS[reason] in shown


def reason_codes_in_use() -> set[str]:
    """Codes given to `Refused`, `Refusal` or `reason=` anywhere in the package."""
    codes = set()
    for path in Path(cs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            if isinstance(node.func, ast.Name) and node.func.id in ("Refused", "Refusal"):
                given += node.args[:1]
            codes |= {each.value for each in given if isinstance(each, ast.Constant)}
    return codes


def test_every_reason_in_use_is_documented_and_every_documented_one_is_used() -> None:
    assert reason_codes_in_use() == set(REASONS)


def test_every_reason_says_something_in_a_sentence() -> None:
    for code, meaning in REASONS.items():
        assert code == code.lower().replace(" ", "_")
        assert meaning.endswith(".")
    assert set(REASONS) >= EXPECTED_DENSE
