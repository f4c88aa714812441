"""Unmodified diffusers models with random weights against the eager reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from builders import BUILDERS
from builders.base import GRID
from builders.base import TEXT_LENGTH
from builders.base import Case
from modules import POLICY
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import expected_output
from modules import parameter_gradients
from torch import nn

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TEXT = {
    "hunyuan video": cs.Text(after=TEXT_LENGTH),
    "cogvideox 5b": cs.Text(before=TEXT_LENGTH),
    "easyanimate": cs.Text(before=TEXT_LENGTH),
}


def _build(name: str, batch: int = 1, grid: tuple[int, ...] = GRID) -> Case:
    return harness.build(BUILDERS[name], batch, grid)


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs)[0]


def _expected(
    name: str, model: nn.Module, inputs: dict[str, Any], grid: tuple[int, ...] = GRID
) -> Any:
    text = TEXT.get(name, cs.Text())
    return expected_output(lambda: _call(model, inputs), grid_thw=grid, text=text)


@pytest.mark.parametrize(
    "name",
    [
        "wan",
        "wan image",
        "skyreels v2",
        "wan vace",
        "hunyuan video",
        "cogvideox 5b",
        pytest.param("easyanimate", marks=pytest.mark.slow),
        pytest.param("anyflow", marks=pytest.mark.slow),
    ],
)
def test_values_and_all_gradients_are_those_of_the_reference(name: str) -> None:
    model, inputs = _build(name)
    expected = _expected(name, model, inputs)
    actual = _call(compile_sparse(model, strict=True), inputs)
    assert_close(actual, expected)
    assert_gradients_close(parameter_gradients(model, actual), parameter_gradients(model, expected))
    assert (actual - _call(model, inputs)).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("grid", [(5, 7, 6), (1, 7, 6)])
@pytest.mark.parametrize("name", ["wan", "hunyuan video"])
def test_odd_grids_one_frame_and_a_batch_are_right(name: str, grid: tuple[int, ...]) -> None:
    model, inputs = _build(name, 2, grid)
    with torch.no_grad():
        actual = _call(compile_sparse(model, strict=True), inputs)
        assert_close(actual, _expected(name, model, inputs, grid))


def test_a_bfloat16_model_is_as_exact_as_the_reference_in_bfloat16() -> None:
    model, inputs = _build("wan")
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


@pytest.mark.slow
def test_resolutions_of_one_model_are_all_right() -> None:
    model, _ = _build("wan")
    compiled = compile_sparse(model)
    with torch.no_grad():
        for grid in ((3, 4, 5), (5, 3, 4), (2, 5, 7), (3, 4, 5)):
            _, inputs = _build("wan", 1, grid)
            assert_close(_call(compiled, inputs), _expected("wan", model, inputs, grid))


def test_repeated_blocks_are_rewritten_under_metadata_and_dense_without() -> None:
    model, inputs = _build("wan")
    with torch.no_grad():
        expected, dense = _expected("wan", model, inputs), _call(model, inputs)
        options = {"policy": POLICY, "inner": "eager"}
        model.compile_repeated_blocks(backend="compiled_sparse", fullgraph=True, options=options)
        assert_close(_call(model, inputs), dense)
        with cs.metadata(grid_thw=GRID):
            assert_close(_call(model, inputs), expected)
