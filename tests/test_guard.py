"""The guard: what it finds on first calls, what it does then, and that it costs nothing later."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from modules import GRID
from modules import POLICY
from modules import Tiny
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import parameter_gradients
from modules import raster
from modules import tokens
from modules import video
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse import backend
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import GuardError
from compiled_sparse.guard import as_guard

pytestmark = pytest.mark.usefixtures("fresh_compiler")

STRICT = {"calls": 2, "rows": 7, "max_relative_error": 1e-3}
EXACT = cs.STA(window_thw=(9, 9, 9), tile_thw=(2, 3, 2))


@pytest.fixture
def statistics(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The findings of each checked call, as they come."""
    seen: list[Any] = []
    read = backend.read_findings

    def recorded(*arguments: Any) -> Any:
        seen.append(read(*arguments))
        return seen[-1]

    monkeypatch.setattr(backend, "read_findings", recorded)
    return seen


def model(**options: Any) -> nn.Module:
    return TinyDiT(2, **options).requires_grad_(False)


def test_a_failed_check_is_reported_loudly_with_paths_and_numbers(
    caplog: pytest.LogCaptureFixture, statistics: list[Any]
) -> None:
    dit, inputs = model(), dit_inputs()
    compiled = compile_sparse(dit, guard=STRICT)
    for _ in range(5):
        assert_close(compiled(*inputs), expected_output(dit, *inputs))
    assert len(statistics) == 2
    (first, second) = (r for r in caplog.records if r.message.startswith("guard:"))
    assert first.levelno == logging.WARNING
    assert "2 of 2 sparse calls failed" in first.message
    assert "blocks.0.attn1: relative error" in first.message
    assert "blocks.1.attn1: relative error" in first.message
    assert "They stay sparse" in second.message


def test_what_equals_dense_attention_passes(
    caplog: pytest.LogCaptureFixture, statistics: list[Any]
) -> None:
    dit, inputs = model(), dit_inputs(batch=2)
    with caplog.at_level(logging.INFO, "compiled_sparse"):
        assert_close(compile_sparse(dit, policy=EXACT, guard=STRICT)(*inputs), dit(*inputs))
    assert "guard: 2 sparse calls checked, worst" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert all(0.0 <= finding.relative_error < 1e-5 for finding in statistics[0])


@pytest.mark.parametrize("rows", [60, 1000], ids=["all rows", "more than there are"])
def test_the_error_is_that_of_the_rows_against_dense_attention(
    statistics: list[Any], rows: int
) -> None:
    tiny, x = Tiny(lambda m, x: m.attn(raster(x))).requires_grad_(False), video()
    tiny.attn.to_out = nn.Identity()
    compile_sparse(tiny, guard={**STRICT, "rows": rows})(x)
    sparse, dense = expected_output(tiny, x), tiny(x)
    expected = float((sparse - dense).norm() / dense.norm())
    ((finding,), *_) = statistics
    assert finding.relative_error == pytest.approx(expected, rel=1e-4 if rows == 60 else 0.1)


def test_the_key_mask_counts_in_the_comparison(statistics: list[Any]) -> None:
    def body(m: Tiny, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return m.attn(torch.cat([raster(x), text], 1), attn_mask=mask)

    mask = torch.arange(67)[None, None, None] < torch.tensor([63, 67])[:, None, None, None]
    compiled = compile_sparse(Tiny(body).requires_grad_(False), policy=EXACT, guard=STRICT)
    compiled(video(2), tokens(2, 7), mask)
    ((finding,), *_) = statistics
    assert finding.relative_error < 1e-5


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_checked_call_gives_the_same_output_and_gradients(inner: str) -> None:
    dit, inputs = TinyDiT(2), dit_inputs()
    compiled = compile_sparse(dit, inner=inner, guard={"calls": 1})
    expected = expected_output(dit, *inputs)
    wanted = parameter_gradients(dit, expected)
    for _ in range(3):
        output = compiled(*inputs)
        assert_close(output, expected)
        assert_gradients_close(parameter_gradients(dit, output), wanted)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_calls_inside_activation_checkpoints_are_checked_too(
    inner: str, statistics: list[Any]
) -> None:
    dit, inputs = TinyDiT(2, checkpoint=True), dit_inputs()
    plain = TinyDiT(2)
    plain.load_state_dict(dit.state_dict())
    output = compile_sparse(dit, inner=inner, guard=STRICT)(*inputs)
    expected = expected_output(plain, *inputs)  # without recomputation, which the mode would miss
    assert_close(output, expected)
    assert_gradients_close(parameter_gradients(dit, output), parameter_gradients(plain, expected))
    assert [finding.path for finding in statistics[0]] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert all(finding.relative_error > 1e-3 for finding in statistics[0])


def test_dense_on_failure_gives_the_dense_result_at_once_and_for_good(
    caplog: pytest.LogCaptureFixture, statistics: list[Any]
) -> None:
    dit, inputs = model(), dit_inputs()
    compiled = compile_sparse(dit, guard={**STRICT, "on_failure": "dense"})
    for _ in range(3):
        assert_close(compiled(*inputs), dit(*inputs))
    assert len(statistics) == 1
    assert caplog.text.count("This graph is dense from now on") == 1


def test_raise_on_failure_names_the_calls_and_what_to_do() -> None:
    compiled = compile_sparse(model(), guard=cs.Guard(max_relative_error=0.0, on_failure="raise"))
    with pytest.raises(GuardError) as caught:
        compiled(*dit_inputs())
    assert "2 of 2 sparse calls failed the guard" in caught.value.problem
    assert re.search(r"blocks\.0\.attn1: relative error \d", caught.value.got)
    assert "relative error up to 0.0" in caught.value.expected
    assert "wider window" in caught.value.next_step


def test_values_that_are_not_finite_are_found_and_dense_attention_is_not_blamed_on_us(
    caplog: pytest.LogCaptureFixture, statistics: list[Any]
) -> None:
    dit, inputs = model(), dit_inputs()
    with torch.no_grad():
        dit.blocks[1].attn1.to_v.bias[3] = float("nan")
    compile_sparse(dit, guard=STRICT)(*inputs)
    sound, broken = statistics[0]
    assert sound.num_bad == 0
    assert sound.dense_is_finite
    assert broken.num_bad == 60
    assert "blocks.1.attn1: relative error nan, 60 values NaN or infinite" in caplog.text
    assert "dense attention is not finite either" in caplog.text


def test_each_variant_is_checked_on_its_own_first_calls(statistics: list[Any]) -> None:
    dit, inputs = model(), dit_inputs()
    policy = cs.Policy({"*": POLICY}, dense_first_steps=3)
    compiled = compile_sparse(dit, policy=policy, guard={**STRICT, "calls": 1})
    for step in range(5):
        with cs.metadata(step=step, num_steps=5):
            dense = step < 3
            actual = compiled(*inputs)
        assert_close(actual, dit(*inputs) if dense else expected_output(dit, *inputs))
        assert len(statistics) == (0 if dense else 1)
    other = cs.STA(window_thw=(1, 3, 1), tile_thw=(3, 2, 2))
    with cs.force(other):
        assert_close(compiled(*inputs), expected_output(dit, *inputs, config=other))
    assert len(statistics) == 2


def test_later_calls_run_a_graph_without_checks(
    monkeypatch: pytest.MonkeyPatch, statistics: list[Any]
) -> None:
    compiled_graphs: list[str] = []
    compile_graph = backend._compile

    def recorded(graph: Any, *rest: Any) -> Any:
        compiled_graphs.append(graph.code)
        return compile_graph(graph, *rest)

    monkeypatch.setattr(backend, "_compile", recorded)
    compiled, inputs = compile_sparse(model(), guard={"calls": 2}), dit_inputs()
    for _ in range(4):
        compiled(*inputs)
    assert ["guard_statistics" in code for code in compiled_graphs] == [True, False]
    assert len(statistics) == 2


def test_without_a_guard_nothing_is_checked(statistics: list[Any]) -> None:
    compile_sparse(model())(*dit_inputs())
    assert statistics == []


def test_new_shapes_go_through_the_checked_graph(statistics: list[Any]) -> None:
    dit = model()
    compiled = compile_sparse(dit, dynamic=True, guard={**STRICT, "calls": 9})
    for grid in (GRID, (5, 7, 6), (2, 3, 7)):
        inputs = dit_inputs(grid)
        assert_close(compiled(*inputs), expected_output(dit, *inputs, grid_thw=grid))
    assert len(statistics) == 3


def test_a_second_try_after_an_error_is_checked_again(statistics: list[Any]) -> None:
    compiled = compile_sparse(model(), guard={**STRICT, "calls": 1, "on_failure": "raise"})
    inputs = dit_inputs()
    for count in (1, 2, 3):
        with pytest.raises(GuardError):
            compiled(*inputs)
        assert len(statistics) == count


def test_no_more_rows_are_compared_than_there_are() -> None:
    q = torch.randn(1, 2, 60, 8)
    out = torch.randn(1, 2, 60, 8)
    few, many = (
        torch.ops.compiled_sparse.guard_statistics(q, q, q, out, None, rows, None)
        for rows in (60, 6000)
    )
    assert torch.equal(few, many)


@pytest.mark.parametrize("value", [True, {}, cs.Guard(), {"calls": 2}])
def test_a_guard_can_be_written_in_several_ways(value: Any) -> None:
    assert as_guard(value) == cs.Guard()
    assert as_guard(None) is None
    assert as_guard(False) is None


@pytest.mark.parametrize(
    "value",
    [
        {"calls": 0},
        {"rows": 0},
        {"max_relative_error": -1.0},
        {"on_failure": "ignore"},
        {"row": 3},
        3,
        "yes",
    ],
    ids=repr,
)
def test_a_guard_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"guard|Guard"):
        as_guard(value)


@pytest.mark.slow
def test_the_guard_works_under_inductor(statistics: list[Any]) -> None:
    dit, inputs = TinyDiT(1), dit_inputs()
    compiled = compile_sparse(dit, inner="inductor", guard={**STRICT, "calls": 1})
    expected = expected_output(dit, *inputs)
    for _ in range(2):
        output = compiled(*inputs)
        assert_close(output, expected, 1e-4)
    assert_gradients_close(
        parameter_gradients(dit, output), parameter_gradients(dit, expected), 1e-4
    )
    assert len(statistics) == 1
