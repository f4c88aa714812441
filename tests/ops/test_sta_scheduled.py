"""Scheduled windows as an op: lists on the CPU and computed ones agree, values, no recompiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings
from strategies import layouts_with_windows
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse.errors import BlockListError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.ops.sta import flatten_windows
from compiled_sparse.ops.sta_scheduled import device_lists
from compiled_sparse.ops.sta_scheduled import select_row
from compiled_sparse.runtime import index_tensor
from compiled_sparse.runtime import table_tensor

OPS = torch.ops.compiled_sparse
CPU = torch.device("cpu")
GRID, TILE, TEXT = (5, 7, 3), (2, 3, 2), (2, 15)
LENGTH = 5 * 7 * 3 + 2 + 15
WINDOWS = ((1, 3, 1), (3, 1, 3), (2, 2, 1))
TABLE = cs.WindowTable(
    windows=WINDOWS,
    choice=[[[0, 1, 2], [2, 2, 1]], [[1, 1, 0], [0, 0, 0]], [[2, 1, 1], [1, 0, 2]]],
)
CONFIG = cs.STA(window_thw=TABLE, tile_thw=TILE)
Lists = tuple[Tensor, Tensor]


def arguments(
    table: cs.WindowTable, step: int, layer: int, text: tuple[int, int] = TEXT
) -> tuple[object, ...]:
    flat = flatten_windows(table.windows)
    schedule = (table_tensor(table, CPU), index_tensor(step, CPU), index_tensor(layer, CPU))
    return (list(GRID), list(TILE), flat, *text, *schedule)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, LENGTH, 8)
    return q, k, v


def assert_same_lists(actual: Lists, expected: Lists) -> None:
    """Lists may be padded with zeros to different widths."""
    width = actual[0].shape[-1]
    assert torch.equal(actual[0], F.pad(expected[0], (0, width - expected[0].shape[-1])))
    assert torch.equal(actual[1], expected[1])
    assert {each.dtype for each in actual} == {torch.int32}


@given(layouts_with_windows())
def test_computed_lists_are_those_of_the_plan(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    expected = sta_lists(layout, windows, CPU)
    text = layout.text_before + layout.text_after
    # A table has rows that need longer lists than this one does.
    width = layout.num_blocks if text else min(expected[0].shape[-1] + 2, layout.num_blocks)
    assert_same_lists(device_lists(layout, torch.tensor(windows), width), expected)


@pytest.mark.parametrize("text", [TEXT, (0, 0)])
@pytest.mark.parametrize("step", [0, 1, 2, 7])
@pytest.mark.parametrize("layer", [0, 1, 5])
def test_step_and_layer_pick_the_row(step: int, layer: int, text: tuple[int, int]) -> None:
    layout = BlockLayout(GRID, TILE, *text)
    lists = OPS.sta_scheduled_block_lists(*arguments(TABLE, step, layer, text))
    assert_same_lists(lists, sta_lists(layout, TABLE.row(step, layer), CPU))
    row = select_row(*arguments(TABLE, step, layer)[-3:])
    assert row.tolist() == [list(window) for window in TABLE.row(step, layer)]


@given(layouts_with_windows())
@settings(max_examples=25)
def test_fake_lists_have_the_real_shapes_and_strides(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    table = cs.WindowTable(windows=windows, choice=[[[0, 0]], [[len(windows) - 1, 0]]])
    axes = [list(layout.grid), list(layout.tile), flatten_windows(windows)]
    geometry = (*axes, layout.text_before, layout.text_after)
    schedule = (table_tensor(table, CPU), index_tensor(1, CPU), index_tensor(0, CPU))
    real = OPS.sta_scheduled_block_lists(*geometry, *schedule)
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(each) for each in schedule]
        fake = OPS.sta_scheduled_block_lists(*geometry, *fakes)
    for each, other in zip(real, fake, strict=True):
        assert (each.shape, each.stride(), each.dtype) == (other.shape, other.stride(), other.dtype)


def test_the_ops_satisfy_their_contract() -> None:
    q, k, v = (each.requires_grad_() for each in tensors())
    torch.library.opcheck(OPS.sta_scheduled_block_lists, arguments(TABLE, 1, 1))
    torch.library.opcheck(
        OPS.sta_scheduled,
        (q, k, v, None, *arguments(TABLE, 1, 0), None),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_window_outside_the_palette_is_refused() -> None:
    geometry, schedule = arguments(TABLE, 0, 0)[:-3], arguments(TABLE, 0, 0)[-3:]
    with pytest.raises(BlockListError, match="not in its palette"):
        OPS.sta_scheduled_block_lists(*geometry, schedule[0] + 2, *schedule[1:])


def test_changing_the_lists_one_was_given_changes_nothing_later() -> None:
    first = OPS.sta_scheduled_block_lists(*arguments(TABLE, 0, 0))
    expected = [each.clone() for each in first]
    for each in first:
        each.fill_(-1)
    again = OPS.sta_scheduled_block_lists(*arguments(TABLE, 0, 0))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize(("step", "layer"), [(0, 0), (1, 1), (9, 1), (2, 0)])
def test_values_and_gradients_are_those_of_the_reference(step: int, layer: int) -> None:
    text = cs.Text(*TEXT)
    inputs = [each.requires_grad_() for each in tensors()]
    out = OPS.sta_scheduled(*inputs, None, *arguments(TABLE, step, layer), None)[0]
    eager = cs.attention(*inputs, CONFIG, grid_thw=GRID, text=text, step=step, layer=layer)
    expected = cs.reference.attention(
        *inputs, CONFIG, grid_thw=GRID, text=text, step=step, layer=layer
    )
    plain = cs.STA(window_thw=TABLE.row(step, layer), tile_thw=TILE)
    same = cs.reference.attention(*inputs, plain, grid_thw=GRID, text=text)
    assert torch.equal(expected, same)
    for actual in (out, eager):
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), inputs)
        wanted = torch.autograd.grad(expected.square().sum(), inputs, retain_graph=True)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want)


def test_without_step_and_layer_the_first_of_each_holds() -> None:
    q, k, v = tensors()
    text = cs.Text(*TEXT)
    for attention in (cs.attention, cs.reference.attention):
        first = attention(q, k, v, CONFIG, grid_thw=GRID, text=text, step=0, layer=0)
        assert torch.equal(attention(q, k, v, CONFIG, grid_thw=GRID, text=text), first)


@pytest.mark.usefixtures("fresh_compiler")
def test_steps_and_layers_compile_once() -> None:
    inputs, geometry = tensors(), arguments(TABLE, 0, 0)[:-3]
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q: Tensor, k: Tensor, v: Tensor, *schedule: Tensor) -> Tensor:
        out: Tensor = OPS.sta_scheduled(q, k, v, None, *geometry, *schedule, None)[0]
        return out

    for step in range(3):
        for layer in range(2):
            table, at_step, at_layer = arguments(TABLE, step, layer)[-3:]
            # One tensor given twice would be another graph to Dynamo.
            out = attend(*inputs, table, at_step, at_layer.clone())
            config = cs.STA(window_thw=TABLE.row(step, layer), tile_thw=TILE)
            expected = cs.attention(*inputs, config, grid_thw=GRID, text=cs.Text(*TEXT))
            torch.testing.assert_close(out, expected)
    assert counter.frame_count == 1
