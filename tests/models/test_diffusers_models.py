"""Unmodified diffusers models with random weights against the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import builders
import pytest
import torch
from modules import POLICY
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import expected_output
from modules import parameter_gradients
from torch import nn

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID = (3, 4, 5)
TEXT = {"hunyuan video": cs.Text(after=builders.TEXT_LENGTH)}
REWRITTEN = [name for name in builders.BUILDERS if name != "hunyuan video 1.5"]


def _call(model: nn.Module, inputs: builders.Inputs) -> Any:
    return model(**inputs)[0]


def _expected(
    name: str, model: nn.Module, inputs: builders.Inputs, grid: tuple[int, ...] = GRID
) -> Any:
    return expected_output(
        lambda: _call(model, inputs), grid_thw=grid, text=TEXT.get(name, cs.Text())
    )


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("wan", ["sparse", "cross_attention"] * 2),
        ("wan image", ["sparse", "cross_attention", "cross_attention"] * 2),
        ("skyreels", ["sparse", "cross_attention"] * 2),
        ("wan vace", ["sparse", "cross_attention"] * 3),
        ("hunyuan video", ["not_video", "sparse", "sparse"]),
        ("hunyuan video 1.5", ["not_video", "layout_unknown"]),
    ],
)
def test_every_attention_call_is_explained(name: str, outcomes: list[str]) -> None:
    model, inputs = builders.BUILDERS[name](GRID)
    with torch.no_grad():
        report = cs.explain(model, policy=POLICY, **inputs)
    assert [site.reason or site.decision for site in report.sites] == outcomes
    assert {site.grid_thw for site in report.sites if site.is_sparse} <= {GRID}


@pytest.mark.parametrize("name", REWRITTEN)
def test_values_and_all_gradients_are_those_of_the_reference(name: str) -> None:
    model, inputs = builders.BUILDERS[name](GRID)
    expected = _expected(name, model, inputs)
    actual = _call(compile_sparse(model, strict=True), inputs)
    assert_close(actual, expected)
    assert_gradients_close(parameter_gradients(model, actual), parameter_gradients(model, expected))
    assert (actual - _call(model, inputs)).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("grid", [(5, 7, 6), (1, 7, 6)])
@pytest.mark.parametrize("build", [builders.wan, builders.hunyuan_video])
def test_odd_grids_one_frame_and_a_batch_are_right(
    build: Callable[..., builders.Case], grid: tuple[int, ...]
) -> None:
    name = "wan" if build is builders.wan else "hunyuan video"
    model, inputs = build(grid, batch=2)
    with torch.no_grad():
        actual = _call(compile_sparse(model, strict=True), inputs)
        assert_close(actual, _expected(name, model, inputs, grid))


def test_a_bfloat16_model_is_as_exact_as_the_reference_in_bfloat16() -> None:
    model, inputs = builders.wan(GRID)
    with torch.no_grad():
        exact = _expected("wan", model, inputs)
        model = model.bfloat16()
        halves = {
            key: value.bfloat16() if isinstance(value, torch.Tensor) else value
            for key, value in inputs.items()
        }
        plain = _expected("wan", model, halves)
        actual = _call(compile_sparse(model), halves)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_resolutions_of_one_model_are_all_right() -> None:
    model, _ = builders.wan(GRID)
    compiled = compile_sparse(model)
    with torch.no_grad():
        for grid in ((3, 4, 5), (5, 3, 4), (2, 5, 7), (3, 4, 5)):
            _, inputs = builders.wan(grid)
            assert_close(_call(compiled, inputs), _expected("wan", model, inputs, grid))


def test_repeated_blocks_are_rewritten_under_metadata_and_dense_without() -> None:
    model, inputs = builders.wan(GRID)
    with torch.no_grad():
        expected, dense = _expected("wan", model, inputs), _call(model, inputs)
        options = {"policy": POLICY, "inner": "eager"}
        model.compile_repeated_blocks(backend="compiled_sparse", fullgraph=True, options=options)
        assert_close(_call(model, inputs), dense)
        with cs.metadata(grid_thw=GRID):
            assert_close(_call(model, inputs), expected)
