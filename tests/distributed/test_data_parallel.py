"""Training with gates and projections under DDP and FSDP2 is that of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from data_parallel import Setup
from data_parallel import Trained
from data_parallel import trained
from data_parallel import trained_by
from modules import assert_gradients_close

SLOW = pytest.mark.slow
ONE_BLOCK = "1 of 2 attention calls sparse"
ALL_BLOCKS = "2 of 4 attention calls sparse"
PARTED = "1 attached modules are not in one graph with their attention"


@pytest.fixture(autouse=True)
def _optimize_ddp_is_left_as_it_was(fresh_compiler: None) -> Iterator[None]:
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield


def alone(setup: Setup) -> Trained:
    """Return what one process comes to, its model compiled as a whole."""
    return trained(Setup(learned=setup.learned, compiled="model"))


def assert_same(actual: Trained, expected: Trained, relative: float = 1e-5) -> None:
    """Check losses, gradients and parameters."""
    assert actual.losses == pytest.approx(expected.losses, rel=relative)
    assert_gradients_close(actual.gradients, expected.gradients, relative)
    assert_gradients_close(actual.parameters, expected.parameters, relative)


@pytest.mark.parametrize(
    ("parallel", "compiled", "learned"),
    [
        ("fsdp", "blocks", "vsa"),
        ("ddp", "model", "vsa"),
        pytest.param("fsdp", "blocks", "sla", marks=SLOW),
        pytest.param("fsdp", "model", "vsa", marks=SLOW),
        pytest.param("fsdp", "model", "sla", marks=SLOW),
        pytest.param("ddp", "model", "sla", marks=SLOW),
        pytest.param("ddp", "blocks", "vsa", marks=SLOW),
        pytest.param("ddp", "blocks", "sla", marks=SLOW),
    ],
)
def test_two_processes_train_as_one_does(parallel: str, compiled: str, learned: str) -> None:
    setup = Setup(parallel=parallel, compiled=compiled, learned=learned)
    expected = alone(setup)
    found = trained_by(2, setup)
    for each in found:
        assert_same(each, expected)
    is_whole = (setup.parallel, setup.compiled) == ("ddp", "model")
    summary = ALL_BLOCKS if is_whole else ONE_BLOCK
    for each in found:
        assert len(each.messages) == 1
        assert each.messages[0].startswith(summary)
    names = [name for name in expected.gradients if "to_gate" in name or "proj_l" in name]
    assert len(names) == 4
    assert all(expected.gradients[name].abs().max() > 0 for name in names)


@SLOW
@pytest.mark.parametrize(
    ("parallel", "inner", "world_size"),
    [("fsdp", "inductor", 2), ("ddp", "inductor", 3), ("fsdp", "aot_eager", 4)],
)
def test_checkpointed_blocks_train_the_same(parallel: str, inner: str, world_size: int) -> None:
    setup = Setup(parallel=parallel, inner=inner, checkpoint=True)
    expected = alone(setup)
    for each in trained_by(world_size, setup):
        assert_same(each, expected)
        assert each.messages[0].startswith(ONE_BLOCK)


@SLOW
@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_sharded_parameters_in_half_precision_train_nearly_the_same(compiled: str) -> None:
    setup = Setup(parallel="fsdp", compiled=compiled, half=True)
    expected = alone(setup)
    for each in trained_by(2, setup):
        assert_same(each, expected, relative=2e-2)
        assert {value.dtype for value in each.parameters.values()} == {torch.float32}
        assert each.messages[0].startswith(ONE_BLOCK)


@SLOW
def test_a_whole_model_under_ddp_needs_no_grid_said() -> None:
    setup = Setup(parallel="ddp", compiled="model", grid=False)
    assert_same(trained_by(2, setup)[0], alone(setup))


@SLOW
def test_modules_that_the_buckets_of_ddp_cut_in_two_are_warned_about() -> None:
    settings: dict[str, Any] = {"parallel": "ddp", "compiled": "model", "bucket": 2000}
    setup = Setup(**settings, inner="aot_eager", optimize_ddp=True)
    found = trained_by(2, setup)[0]
    assert sum(message.startswith(PARTED) for message in found.messages) == 2
    assert not any("1 of" in message for message in found.messages)
    kept = trained_by(2, replace(setup, optimize_ddp=False))[0]
    assert_same(kept, alone(setup))


@SLOW
def test_a_whole_model_under_fsdp_is_warned_about_where_no_grid_is_said() -> None:
    setup = Setup(parallel="fsdp", compiled="model", grid=False)
    for each in trained_by(2, setup):
        assert not any("1 of" in message for message in each.messages)
        assert "layout_unknown" in each.messages[1]
        assert "pass cs.metadata(grid_thw=" in each.messages[1]
