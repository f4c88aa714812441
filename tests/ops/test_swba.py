"""Sliding-window block attention as an op: lists, values, gradients, what the compiler sees."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import ShapeError
from compiled_sparse.ops.plan import swba_lists

OPS = torch.ops.compiled_sparse
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTH = 333
"""Every block but those of 1 and 3 leaves a shorter last one."""
CASES = [
    (block, window)
    for block in (1, 3, 16, 60, 100, 256)
    for window in sorted({1, 2, -(-LENGTH // block), 1000})
]


def naive_mask(length: int, block: int, window: int) -> Tensor:
    """Which keys each query sees: hidden blocks first, then token by token, [1, 1, L, L]."""
    num_blocks = -(-length // block)
    i, j = torch.meshgrid(torch.arange(num_blocks), torch.arange(num_blocks), indexing="ij")
    hidden = (j > i) | (j <= i - window)
    hidden = hidden.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return ~hidden[None, None, :length, :length]


def naive(q: Tensor, k: Tensor, v: Tensor, block: int, window: int) -> Tensor:
    """The published naive formula."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = ~naive_mask(q.shape[2], block, window)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def swba(
    length: int, block: int, window: int, key_mask: Tensor | None = None, scale: float | None = None
) -> helpers.Attention:
    """The registered op as a function of q, k and v."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.swba(q, k, v, key_mask, length, block, window, scale)

    return attention


def tensors(
    kv_heads: int = 3, dtype: torch.dtype = torch.float32, length: int = LENGTH
) -> list[Tensor]:
    return [torch.randn(2, heads, length, 8).to(dtype) for heads in (3, kv_heads, kv_heads)]


@pytest.mark.parametrize(("block", "window"), CASES)
def test_values_and_gradients_are_those_of_the_naive_formula(block: int, window: int) -> None:
    inputs = [each.requires_grad_() for each in tensors(dtype=torch.float64)]
    config = cs.SWBA(block=block, window=window)
    weights = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = naive(*inputs, block, window)
    expected_grads = torch.autograd.grad(expected, inputs, weights)
    for module in (cs, cs.reference):
        out = module.attention(*inputs, config)
        torch.testing.assert_close(out, expected)
        for grad, each in zip(
            torch.autograd.grad(out, inputs, weights), expected_grads, strict=True
        ):
            torch.testing.assert_close(grad, each)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "window"), [(3, 2), (16, 1), (60, 3), (100, 2), (256, 4)])
def test_the_error_is_that_of_plain_arithmetic(block: int, window: int, dtype: torch.dtype) -> None:
    mask = naive_mask(LENGTH, block, window)
    helpers.assert_matches_oracle(swba(LENGTH, block, window), *tensors(dtype=dtype), mask)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("block", "window"), [(1, 2), (16, 3), (100, 2)])
def test_padding_grouped_heads_and_scale_match_the_naive_rule(block: int, window: int) -> None:
    q, k, v = tensors(kv_heads=1)
    key_mask = torch.rand(k.shape[0], k.shape[2]) < 0.7
    mask = naive_mask(LENGTH, block, window)
    attention = swba(LENGTH, block, window, key_mask, 0.3)
    helpers.assert_matches_oracle(attention, q, k, v, mask, key_mask=key_mask, scale=0.3)
    qkv = [each.double() for each in (q, k, v)]
    config = cs.SWBA(block=block, window=window)
    expected = cs.reference.attention(*qkv, config, key_mask=key_mask, scale=0.3)
    torch.testing.assert_close(attention(*qkv)[0], expected)


@pytest.mark.parametrize("window", [2, 50])
def test_no_token_sees_a_later_block(window: int) -> None:
    q, k, v = (each.requires_grad_() for each in tensors())
    out = cs.attention(q, k, v, cs.SWBA(block=60, window=window))
    for grad in torch.autograd.grad(out[:, :, :120].sum(), (k, v)):
        assert bool((grad[:, :, 120:] == 0).all())
        assert bool((grad[:, :, :120] != 0).any())


def test_one_block_is_dense_attention() -> None:
    q, k, v = tensors(dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for block in (LENGTH, 10 * LENGTH):
        torch.testing.assert_close(cs.attention(q, k, v, cs.SWBA(block=block, window=1)), expected)


@given(st.integers(1, 90), st.integers(1, 100), st.integers(1, 12))
def test_the_lists_are_those_of_the_naive_rule(length: int, block: int, window: int) -> None:
    indices, counts = swba_lists(length, block, window, CPU)
    num_blocks = -(-length // block)
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape == (1, 1, num_blocks, min(window, num_blocks))
    assert counts.shape == (1, 1, num_blocks)
    for i in range(num_blocks):
        row, count = indices[0, 0, i].tolist(), int(counts[0, 0, i])
        assert row[:count] == [j for j in range(num_blocks) if i - window + 1 <= j <= i]
        assert row[count:] == [0] * (len(row) - count)


@given(st.integers(1, 90), st.integers(1, 100), st.integers(1, 12))
@settings(max_examples=25)
def test_fake_lists_have_the_real_shapes_and_strides(length: int, block: int, window: int) -> None:
    real = OPS.swba_block_lists(length, block, window, CPU)
    with FakeTensorMode():
        fake = OPS.swba_block_lists(length, block, window, CPU)
    for each, other in zip(real, fake, strict=True):
        assert (each.shape, each.stride(), each.dtype) == (other.shape, other.stride(), other.dtype)


def test_the_lists_of_a_plan_are_built_once_and_never_handed_out() -> None:
    inputs = tensors()
    swba_lists.cache_clear()
    for _ in range(3):
        swba(LENGTH, 16, 2)(*inputs)
    assert (swba_lists.cache_info().misses, swba_lists.cache_info().hits) == (1, 2)
    given_out, _ = OPS.swba_block_lists(LENGTH, 16, 2, CPU)
    given_out.fill_(-1)
    assert int(swba_lists(LENGTH, 16, 2, CPU)[0].min()) == 0


def test_lists_made_in_inference_mode_serve_training() -> None:
    swba_lists.cache_clear()
    inputs = [each.requires_grad_() for each in tensors()]
    with torch.inference_mode():
        swba(LENGTH, 16, 2)(*inputs)
    swba(LENGTH, 16, 2)(*inputs)[0].sum().backward()
    assert all(each.grad is not None for each in inputs)


def test_a_grid_and_text_only_have_to_add_up_to_the_sequence() -> None:
    q, k, v = tensors(length=70)
    config = cs.SWBA(block=16, window=2)
    layout = {"grid_thw": (3, 4, 5), "text": cs.Text(before=3, after=7)}
    for module in (cs, cs.reference):
        out, lse = module.attention(q, k, v, config, return_lse=True)
        same_out, same_lse = module.attention(q, k, v, config, **layout, return_lse=True)
        assert torch.equal(out, same_out)
        assert torch.equal(lse, same_lse)
        with pytest.raises(LayoutError, match="do not add up"):
            module.attention(q, k, v, config, grid_thw=(3, 4, 5))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_grid_may_be_made_of_traced_sizes() -> None:
    config = cs.SWBA(block=16, window=2)

    def attend(video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([video, text], dim=2)
        layout = {"grid_thw": (video.shape[2] // 12, 3, 4), "text": cs.Text(after=text.shape[2])}
        return cs.attention(x, x, x, config, **layout)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for frames, text in ((3, 5), (6, 9), (9, 17)):
        inputs = torch.randn(1, 2, frames * 12, 8), torch.randn(1, 2, text, 8)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert counter.frame_count <= 2


def test_cross_attention_and_tensors_of_a_wrong_rank_are_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(ShapeError, match="one sequence"):
        cs.attention(q, k[:, :, :50], v[:, :, :50], cs.SWBA())
    for rank in (1, 2, 3):
        with pytest.raises(ShapeError, match="wrong rank"):
            cs.attention(q[(0,) * (4 - rank)], k, v, cs.SWBA())


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = cs.attention(q, k, v, cs.SWBA(block=16))
    assert out.dtype == torch.bfloat16
    expected = cs.attention(*(each.bfloat16() for each in (q, k, v)), cs.SWBA(block=16))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_opcheck_accepts_the_ops(masked: bool, grad: bool) -> None:
    inputs = [each.requires_grad_(grad) for each in tensors(kv_heads=1, length=50)]
    key_mask = torch.rand(2, 50) < 0.9 if masked else None
    torch.library.opcheck(OPS.swba.default, (*inputs, key_mask, 50, 16, 2, None))
    torch.library.opcheck(OPS.swba_block_lists.default, (50, 16, 2, CPU))


def test_the_traced_op_is_one_list_op_and_one_kernel_op() -> None:
    graph = torch.fx.experimental.proxy_tensor.make_fx(swba(LENGTH, 16, 2))(*tensors())
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    ours = [op for op in called if "compiled_sparse" in str(op)]
    assert ours == [OPS.swba_block_lists.default, OPS.block_sparse_attention.default]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_dynamic_lengths_of_several_blocks_take_at_most_two_compilations(
    backend: str, training: bool
) -> None:
    counter = CompileCounterWithBackend(backend)
    config = cs.SWBA(block=16, window=2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cs.attention(q, k, v, config)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    # Lengths of one block make one more: the compiler treats sizes of one as constants.
    for length in (50, 71, 130, 33, 9):
        inputs = [each.requires_grad_(training) for each in tensors(length=length)]
        out, expected = compiled(*inputs), attend(*inputs)
        torch.testing.assert_close(out, expected)
        if training:
            grads = torch.autograd.grad(out.square().sum(), inputs)
            expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
            for grad, each in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, each)
        assert counter.frame_count <= (2 if length > 16 else 3)
