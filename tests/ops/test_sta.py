"""Sliding tile attention as an op: lists, values, gradients, and what the compiler sees."""

from __future__ import annotations

from collections.abc import Callable

import helpers
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from strategies import layouts_with_windows
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.ops.sta import flatten_windows

OPS = torch.ops.compiled_sparse
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID, TILE, TEXT = (5, 7, 3), (2, 3, 2), (2, 15)
PER_HEAD = ((1, 3, 3), (3, 1, 1), (2, 2, 1))
ODD_GRIDS = {
    "video": (GRID, TILE, ((1, 3, 1),), TEXT),
    "video per head": (GRID, TILE, PER_HEAD, TEXT),
    "video without text": (GRID, TILE, PER_HEAD, (0, 0)),
    "image": ((13, 11), (3, 4), ((3, 1),), (0, 5)),
    "audio": ((61,), (4,), ((5,), (3,), (1,)), (7, 0)),
}
Case = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, int]]


def sta(
    case: Case, key_mask: Tensor | None = None, scale: float | None = None
) -> helpers.Attention:
    """The registered op as a function of q, k and v."""
    grid, tile, windows, text = case

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        geometry = (list(grid), list(tile), flatten_windows(windows), *text)
        return OPS.sta(q, k, v, key_mask, *geometry, scale)

    return attention


def tensors(case: Case, kv_heads: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    length = torch.Size(case[0]).numel() + sum(case[3])
    return [torch.randn(2, heads, length, 8).to(dtype) for heads in (3, kv_heads, kv_heads)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_GRIDS.values(), ids=ODD_GRIDS)
def test_values_and_gradients_match_the_naive_window_rule(case: Case, dtype: torch.dtype) -> None:
    grid, tile, windows, text = case
    mask = oracle.sta_mask(grid, tile, windows, *text)[None]
    assert 0 < mask.double().mean() < 1
    helpers.assert_matches_oracle(sta(case), *tensors(case, dtype=dtype), mask)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ODD_GRIDS.values(), ids=ODD_GRIDS)
def test_padding_grouped_heads_and_scale_match_the_naive_rule(case: Case) -> None:
    grid, tile, windows, text = case
    q, k, v = tensors(case, kv_heads=1)
    key_mask = torch.rand(k.shape[0], k.shape[2]) < 0.7
    mask = oracle.sta_mask(grid, tile, windows, *text)[None]
    attention = sta(case, key_mask, 0.3)
    helpers.assert_matches_oracle(attention, q, k, v, mask, key_mask=key_mask, scale=0.3)


@given(layouts_with_windows())
@settings(max_examples=25)
def test_any_layout_and_window_matches_the_naive_rule(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    text = (layout.text_before, layout.text_after)
    mask = oracle.sta_mask(layout.grid, layout.tile, windows, *text)[None]
    q, k, v = torch.randn(3, 1, len(windows), layout.num_tokens, 4, dtype=torch.float64)
    out, lse = sta((layout.grid, layout.tile, windows, text))(q, k, v)
    expected_out, expected_lse = oracle.attention(q, k, v, mask)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_a_window_that_spans_the_grid_is_dense_attention() -> None:
    case: Case = (GRID, TILE, ((5, 4, 2),), TEXT)
    q, k, v = tensors(case, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sta(case)(q, k, v)[0], expected)


def test_an_even_window_acts_as_the_next_odd_one() -> None:
    q, k, v = tensors((GRID, (1, 1, 1), (), TEXT))
    even, odd = (
        sta((GRID, (1, 1, 1), (window,), TEXT))(q, k, v)[0] for window in ((2, 4, 1), (3, 5, 1))
    )
    assert torch.equal(even, odd)


def list_arguments(layout: BlockLayout, windows: tuple[tuple[int, ...], ...]) -> list[object]:
    flat = flatten_windows(windows)
    axes = [list(layout.grid), list(layout.tile), flat]
    return [*axes, layout.text_before, layout.text_after, torch.device("cpu")]


@given(layouts_with_windows())
def test_fake_lists_have_the_real_shapes_and_strides(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    arguments = list_arguments(*case)
    real = OPS.sta_block_lists(*arguments)
    with FakeTensorMode():
        fake = OPS.sta_block_lists(*arguments)
    for each, other in zip(real, fake, strict=True):
        assert (each.shape, each.stride(), each.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("case", ODD_GRIDS.values(), ids=ODD_GRIDS)
def test_opcheck_accepts_the_lists(case: Case) -> None:
    grid, tile, windows, text = case
    arguments = list_arguments(BlockLayout(grid, tile, *text), windows)
    torch.library.opcheck(OPS.sta_block_lists.default, tuple(arguments))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_accepts_the_op(dtype: torch.dtype, masked: bool, grad: bool) -> None:
    case: Case = (GRID, TILE, PER_HEAD, TEXT)
    inputs = [
        each.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(grad)
        for each in tensors(case, kv_heads=1, dtype=dtype)
    ]
    key_mask = torch.rand(2, inputs[0].shape[2]) < 0.9 if masked else None
    geometry = (list(GRID), list(TILE), flatten_windows(PER_HEAD), *TEXT)
    torch.library.opcheck(OPS.sta.default, (*inputs, key_mask, *geometry, None))


def test_the_lists_of_a_plan_are_built_once() -> None:
    case: Case = (GRID, TILE, ((1, 3, 1),), TEXT)
    inputs = tensors(case)
    sta_lists.cache_clear()
    for _ in range(3):
        sta(case)(*inputs)
    assert sta_lists.cache_info().misses == 1
    assert sta_lists.cache_info().hits == 2
    sta((GRID, TILE, ((3, 3, 1),), TEXT))(*inputs)
    assert sta_lists.cache_info().misses == 2


def test_changing_the_lists_one_was_given_changes_nothing_later() -> None:
    layout, windows = BlockLayout(GRID, TILE, *TEXT), ((1, 3, 1),)
    first = OPS.sta_block_lists(*list_arguments(layout, windows))
    expected = [each.clone() for each in first]
    for each in first:
        each.fill_(-1)
    again = OPS.sta_block_lists(*list_arguments(layout, windows))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_lists_made_in_inference_mode_serve_training() -> None:
    case: Case = (GRID, TILE, ((1, 1, 1),), TEXT)
    sta_lists.cache_clear()
    inputs = [each.requires_grad_() for each in tensors(case)]
    with torch.inference_mode():
        sta(case)(*inputs)
    sta(case)(*inputs)[0].sum().backward()
    assert all(each.grad is not None for each in inputs)


def test_a_changed_default_device_does_not_leak_into_the_lists() -> None:
    case: Case = (GRID, (2, 2, 3), ((1, 3, 1),), TEXT)
    inputs = tensors(case)
    with torch.device("meta"):
        out, _ = sta(case)(*inputs)
        lists = OPS.sta_block_lists(*list_arguments(BlockLayout(*case[:2], *TEXT), case[2]))
    assert all(each.device.type == "cpu" for each in lists)
    assert torch.equal(out, sta(case)(*inputs)[0])


def test_the_traced_op_is_one_list_op_and_one_kernel_op() -> None:
    case: Case = (GRID, TILE, PER_HEAD, TEXT)
    graph = torch.fx.experimental.proxy_tensor.make_fx(sta(case))(*tensors(case))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    ours = [op for op in called if "compiled_sparse" in str(op)]
    assert ours == [OPS.sta_block_lists.default, OPS.block_sparse_attention.default]


def video_and_text(frames: int, text: int) -> tuple[Tensor, Tensor]:
    """Tokens of `frames` x 3 x 4 and of text."""
    return torch.randn(1, 2, frames * 12, 8), torch.randn(1, 2, text, 8)


def joint(windows: tuple[tuple[int, ...], ...]) -> Callable[[Tensor, Tensor], Tensor]:
    def attend(video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([video, text], dim=2)
        grid = (video.shape[2] // 12, 3, 4)
        config = cs.STA(window_thw=windows, tile_thw=(2, 2, 3))
        return cs.attention(x, x, x, config, grid_thw=grid, text=cs.Text(after=text.shape[2]))

    return attend


SIZES = [(3, 5), (6, 9), (9, 17), (12, 30)]


@pytest.mark.parametrize("windows", [((3, 1, 1),), ((3, 1, 1), (1, 3, 3))], ids=["one", "per head"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_grids_and_text_take_at_most_two_compilations(
    windows: tuple[tuple[int, ...], ...], training: bool
) -> None:
    attend = joint(windows)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for frames, text in SIZES:
        inputs = [each.requires_grad_(training) for each in video_and_text(frames, text)]
        out, expected = compiled(*inputs), attend(*inputs)
        assert torch.equal(out, expected)
        if training:
            grads = torch.autograd.grad(out.square().sum(), inputs)
            expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
            assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert counter.frame_count <= 2


def shrinking_text(x: Tensor, video: Tensor) -> Tensor:
    num_video = video.shape[0]
    config = cs.STA(window_thw=(3,), tile_thw=(4,))
    text = cs.Text(after=x.shape[2] - num_video)
    return cs.attention(x, x, x, config, grid_thw=(num_video,), text=text)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_agrees_where_a_dynamic_text_vanishes() -> None:
    compiled = torch.compile(shrinking_text, fullgraph=True, dynamic=True)
    for length, num_video in ((50, 40), (70, 44), (41, 41), (60, 60)):
        x, video = torch.randn(1, 2, length, 8), torch.zeros(num_video)
        torch.testing.assert_close(compiled(x, video), shrinking_text(x, video))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_gives_the_eager_values_and_gradients_on_dynamic_grids() -> None:
    attend = joint(((3, 1, 1),))
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for frames, text in SIZES[:3]:
        inputs = [each.requires_grad_() for each in video_and_text(frames, text)]
        out, expected = compiled(*inputs), attend(*inputs)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.square().sum(), inputs)
        expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)
