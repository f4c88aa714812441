"""Checkpoints around blocks compiled alone: a backward pass repeats what the forward pass did."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layered import layered_output
from modules import GRID
from modules import POLICY
from modules import TinyDiT
from modules import assert_gradients_close
from modules import dit_inputs
from modules import parameter_gradients
from test_regional import SCHEDULED
from test_regional import regional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import compiled_sparse as cs
from compiled_sparse.errors import RecomputeError
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.metadata import State
from compiled_sparse.recompute import ForwardCalls

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TURNED = (3, 5, 4)
"""A grid as long as `GRID`."""


class Telling(TinyDiT):
    """A model from whose call the grid can be read."""

    config = SimpleNamespace(in_channels=2, patch_size=(1, 2, 2))

    def forward(self, hidden_states: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """Call the argument what diffusers calls it."""
        return super().forward(hidden_states, text, step)


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def checkpointed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TinyDiT:
    """A model that says its grid and recomputes its blocks."""

    def either(block: Any, *args: Any, use_reentrant: bool) -> Any:
        return checkpoint(block, *args, use_reentrant=request.param)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", either)
    return Telling(3, checkpoint=True)


def gradients_of(model: TinyDiT, output: Tensor) -> dict[str, Tensor]:
    """As `parameter_gradients`, by a backward pass; re-entrant checkpoints know no other."""
    torch.manual_seed(1)
    model.zero_grad()
    output.backward(torch.randn(output.shape))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reference_gradients(
    model: TinyDiT, inputs: Any, configs: Any, grid: tuple[int, ...] = GRID
) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    plain.checkpoint = False
    output = layered_output(plain, *inputs, configs=configs, grid_thw=grid)
    return parameter_gradients(plain, output)


def test_the_recomputation_has_the_grid_that_the_model_read(checkpointed: TinyDiT) -> None:
    grids = (GRID, TURNED, GRID)
    inputs = [dit_inputs(grid) for grid in grids]
    expected = [
        reference_gradients(checkpointed, each, [POLICY] * 3, grid)
        for each, grid in zip(inputs, grids, strict=True)
    ]
    cs.attach(checkpointed, POLICY)
    regional(checkpointed, inner="aot_eager")
    for each, gradients in zip(inputs, expected, strict=True):
        assert_gradients_close(gradients_of(checkpointed, checkpointed(*each)), gradients)


def test_the_recomputation_has_the_step_of_the_forward_call(checkpointed: TinyDiT) -> None:
    inputs = dit_inputs()
    expected = [
        reference_gradients(checkpointed, inputs, [SCHEDULED.at(step, i) for i in range(3)])
        for step in range(2)
    ]
    cs.attach(checkpointed, SCHEDULED)
    regional(checkpointed, inner="aot_eager")
    for step, gradients in enumerate(expected):
        with cs.metadata(step=step):
            output = checkpointed(*inputs)
        assert_gradients_close(gradients_of(checkpointed, output), gradients)


def test_several_forward_calls_before_one_backward(checkpointed: TinyDiT) -> None:
    inputs = [dit_inputs(), dit_inputs((2, 4, 5))]
    expected = [
        reference_gradients(checkpointed, each, [POLICY] * 3, grid)
        for each, grid in zip(inputs, (GRID, (2, 4, 5)), strict=True)
    ]
    cs.attach(checkpointed, POLICY)
    regional(checkpointed, inner="aot_eager")
    outputs = [checkpointed(*each) for each in inputs]
    for output, gradients in zip(outputs, expected, strict=True):
        assert_gradients_close(gradients_of(checkpointed, output), gradients)


def test_a_backward_pass_in_another_thread(checkpointed: TinyDiT) -> None:
    inputs = dit_inputs()
    expected = reference_gradients(checkpointed, inputs, [POLICY] * 3)
    cs.attach(checkpointed, POLICY)
    regional(checkpointed, inner="aot_eager")
    output, actual = checkpointed(*inputs), {}

    def backward() -> None:
        actual.update(gradients_of(checkpointed, output))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert_gradients_close(actual, expected)


@pytest.mark.slow
def test_two_grids_of_one_length_cannot_be_told_apart(checkpointed: TinyDiT) -> None:
    inputs = [dit_inputs(grid) for grid in (GRID, TURNED)]
    expected = reference_gradients(checkpointed, inputs[0], [POLICY] * 3)
    cs.attach(checkpointed, POLICY)
    regional(checkpointed, inner="aot_eager")
    outputs = [checkpointed(*each) for each in inputs]
    with pytest.raises(RecomputeError, match="any of several calls") as caught:
        gradients_of(checkpointed, outputs[0])
    assert f"grid {GRID} and with grid {TURNED}" in caught.value.got
    assert "around backward" in caught.value.next_step
    output = checkpointed(*inputs[0])
    assert outputs[1].requires_grad
    with cs.metadata(grid_thw=GRID):
        assert_gradients_close(gradients_of(checkpointed, output), expected)


def sparsities(model: TinyDiT, inputs: Any) -> dict[float, dict[str, Tensor]]:
    """Return the gradients at two sparsities, by the reference."""
    configs = {s: cs.VSA(sparsity=s, tile_thw=(2, 3, 2)) for s in (0.25, 0.75)}
    return {s: reference_gradients(model, inputs, [each] * 3) for s, each in configs.items()}


def whole(model: TinyDiT) -> Any:
    """Compile a model as one graph; nobody names its grid."""
    options = {"inner": "aot_eager", "policy": cs.VSA(tile_thw=(2, 3, 2))}
    return torch.compile(model, backend="compiled_sparse", options=options)


def test_a_sparsity_alone_is_that_of_the_forward_call() -> None:
    model, inputs = TinyDiT(3, checkpoint=False), dit_inputs()
    expected = sparsities(model, inputs)
    compiled = whole(model)
    for sparsity, gradients in expected.items():
        with cs.metadata(sparsity=sparsity):
            output = checkpoint(compiled, *inputs, use_reentrant=False)
        assert_gradients_close(gradients_of(model, output), gradients)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("outer", [None, 0.5])
def test_what_is_said_of_other_calls_is_not_that_of_the_forward_call(
    outer: float | None, use_reentrant: bool
) -> None:
    model, inputs = TinyDiT(3, checkpoint=False), dit_inputs()
    inputs[0].requires_grad_()
    expected = sparsities(model, inputs)
    compiled = whole(model)
    for sparsity, gradients in expected.items():
        with cs.metadata(grid_thw=GRID, sparsity=outer):
            with cs.metadata(sparsity=sparsity):
                output = checkpoint(compiled, *inputs, use_reentrant=use_reentrant)
            assert_gradients_close(gradients_of(model, output), gradients)


@pytest.mark.slow
def test_two_sparsities_that_wait_are_told_apart_by_what_is_held_around_backward() -> None:
    model, inputs = TinyDiT(3, checkpoint=False), dit_inputs()
    expected = sparsities(model, inputs)
    compiled = whole(model)
    outputs = {}
    for sparsity in expected:
        with cs.metadata(sparsity=sparsity):
            outputs[sparsity] = checkpoint(compiled, *inputs, use_reentrant=False)
    with pytest.raises(RecomputeError, match=r"sparsity 0.25 and with grid None, sparsity 0.75"):
        gradients_of(model, outputs[0.25])
    for sparsity, gradients in expected.items():
        with cs.metadata(sparsity=sparsity):
            output = checkpoint(compiled, *inputs, use_reentrant=False)
            assert_gradients_close(gradients_of(model, output), gradients)


def test_calls_whose_outputs_are_dropped_are_forgotten(checkpointed: TinyDiT) -> None:
    inputs = dit_inputs()
    expected = reference_gradients(checkpointed, inputs, [POLICY] * 3)
    cs.attach(checkpointed, POLICY)
    regional(checkpointed, inner="aot_eager")
    checkpointed(*dit_inputs(TURNED))
    assert_gradients_close(gradients_of(checkpointed, checkpointed(*inputs)), expected)


@pytest.mark.slow
def test_calls_without_gradients_are_not_remembered(checkpointed: TinyDiT) -> None:
    inputs = dit_inputs()
    expected = reference_gradients(checkpointed, inputs, [POLICY] * 3)
    cs.attach(checkpointed, POLICY)
    regional(checkpointed, inner="aot_eager")
    with torch.no_grad():
        checkpointed(*dit_inputs(TURNED))
    assert_gradients_close(gradients_of(checkpointed, checkpointed(*inputs)), expected)


def test_what_was_never_said_is_not_made_up(checkpointed: TinyDiT) -> None:
    inputs = dit_inputs()
    expected = reference_gradients(checkpointed, inputs, [None] * 3)
    regional(checkpointed, inner="aot_eager", policy=POLICY)
    assert_gradients_close(gradients_of(checkpointed, checkpointed(*inputs)), expected)


def test_a_second_backward_finds_the_same_again() -> None:
    calls, shapes, kept = ForwardCalls(), ((1, 2),), torch.zeros(1, 2)
    first, second = State(), State(call=CallMetadata(step=1))
    calls.remember(shapes, first, [kept])
    for _ in range(2):
        assert calls.recalled(shapes) == first
        calls.computed_again(shapes, first)
    calls.remember(shapes, second, [kept])
    assert calls.recalled(shapes) == second
    assert calls.recalled(((3,),)) is None


def test_inputs_that_are_kept_elsewhere_meanwhile_count_all() -> None:
    calls, shapes = ForwardCalls(), ((1, 2),)
    first, second = State(), State(call=CallMetadata(step=1))
    calls.remember(shapes, first, [torch.zeros(1, 2)])
    assert calls.recalled(shapes) == first
    calls.remember(shapes, second, [torch.zeros(1, 2)])
    with pytest.raises(RecomputeError, match="grid None and with grid None, step 1"):
        calls.recalled(shapes)
