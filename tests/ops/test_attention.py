"""`cs.attention`: any mechanism as a function, eagerly, under autocast and compiled."""

from __future__ import annotations

from typing import Any

import helpers
import oracle
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import ShapeError

GRID, TEXT = (5, 7, 3), cs.Text(4, 9)
LENGTH = 118
STA = cs.STA(window_thw=(1, 3, 1), tile_thw=(2, 3, 2))
PER_HEAD = cs.STA(window_thw=((1, 3, 1), (3, 1, 1), (1, 1, 1)), tile_thw=(2, 3, 2))
sdpa = torch.nn.functional.scaled_dot_product_attention


def tensors(dtype: torch.dtype = torch.float32, kv_heads: int = 3) -> list[Tensor]:
    return [torch.randn(2, heads, LENGTH, 8).to(dtype) for heads in (3, kv_heads, kv_heads)]


def attend(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"config": STA, "grid_thw": GRID, "text": TEXT, **changes}
    return cs.attention(q, k, v, **arguments)


def padding() -> Tensor:
    return torch.rand(2, LENGTH) < 0.8


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [STA, PER_HEAD], ids=["one window", "per head"])
def test_sta_matches_the_naive_rule(config: cs.STA, dtype: torch.dtype) -> None:
    key_mask = padding()
    windows = config.windows
    mask = oracle.sta_mask(GRID, config.tile_thw, windows, TEXT.before, TEXT.after)[None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, config=config, key_mask=key_mask, scale=0.4, return_lse=True)

    inputs = tensors(dtype, kv_heads=1)
    helpers.assert_matches_oracle(attention, *inputs, mask, key_mask=key_mask, scale=0.4)


@pytest.mark.parametrize("config", [STA, PER_HEAD, cs.STA(window_thw=(1, 1, 1), tile_thw="auto")])
def test_sta_agrees_with_the_reference(config: cs.STA) -> None:
    q, k, v = tensors(torch.float64)
    key_mask = padding()
    arguments: dict[str, Any] = {"grid_thw": GRID, "text": TEXT, "key_mask": key_mask}
    actual = cs.attention(q, k, v, config, **arguments, return_lse=True)
    expected = cs.reference.attention(q, k, v, config, **arguments, return_lse=True)
    for each, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(each, other)


def test_the_output_comes_alone_unless_the_log_sum_exp_is_asked_for() -> None:
    q, k, v = tensors()
    out, lse = attend(q, k, v, return_lse=True)
    assert torch.equal(attend(q, k, v), out)
    assert lse.dtype == torch.float32
    assert lse.shape == q.shape[:-1]


def test_a_grid_may_be_a_list_and_text_may_be_absent() -> None:
    q, k, v = (each[:, :, :105] for each in tensors())
    expected = attend(q, k, v, text=cs.Text())
    assert torch.equal(attend(q, k, v, grid_thw=list(GRID), text=None), expected)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_dense_is_scaled_dot_product_attention(masked: bool, kv_heads: int) -> None:
    q, k, v = tensors(kv_heads=kv_heads)
    key_mask = padding() if masked else None
    mask = None if key_mask is None else key_mask[:, None, None]
    out = cs.attention(q, k, v, cs.Dense(), key_mask=key_mask, scale=0.4)
    assert torch.equal(out, sdpa(q, k, v, mask, scale=0.4, enable_gqa=kv_heads != 3))


def test_dense_takes_keys_of_another_length() -> None:
    q, k, v = tensors()
    out = cs.attention(q, k[:, :, :7], v[:, :, :7], cs.Dense(), grid_thw=GRID)
    assert torch.equal(out, sdpa(q, k[:, :, :7], v[:, :, :7]))


def test_a_sequence_the_layout_does_not_describe_is_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(LayoutError, match="do not add up to the length of q"):
        attend(q, k, v, text=cs.Text(4, 8))
    with pytest.raises(LayoutError, match="different numbers of axes"):
        attend(q, k, v, grid_thw=(35, 3))
    with pytest.raises(LayoutError, match="different numbers of axes"):
        attend(q, k, v, config=cs.STA(tile_thw="auto"), grid_thw=(105,))


def test_cross_attention_is_refused_even_where_lists_would_fit() -> None:
    q, k, v = tensors()
    longer = [torch.cat([each, each], dim=2) for each in (k, v)]
    config = cs.STA(window_thw=(3,), tile_thw=(4,))
    with pytest.raises(ShapeError, match="queries and keys of one sequence"):
        cs.attention(q, *longer, config, grid_thw=(LENGTH,))


def test_a_wrong_rank_is_reported_by_name() -> None:
    q, k, v = tensors()
    with pytest.raises(ShapeError, match="q has the wrong rank"):
        attend(q[0], k, v)
    with pytest.raises(ShapeError, match="v has the wrong rank"):
        attend(q, k, v[0])


CONFIGS = [STA, PER_HEAD, cs.Dense()]
NAMES = ["one window", "per head", "dense"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_autocast_casts_as_it_does_for_sdpa(config: MechanismConfig, dtype: torch.dtype) -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype):
        out = attend(q, k, v, config=config)
        assert out.dtype == sdpa(q, k, v).dtype == dtype
    expected = attend(*(each.to(dtype) for each in (q, k, v)), config=config)
    assert torch.equal(out, expected)


def test_autocast_unites_mixed_dtypes() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q, k.bfloat16(), v.half(), return_lse=True)
    expected = attend(q.bfloat16(), k.bfloat16(), v.half().bfloat16())
    assert torch.equal(out, expected)
    assert lse.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = tensors(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v), attend(*tensors_like(q, k, v)))
        assert attend(q, k, v).dtype == torch.float64


def tensors_like(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.clone() for each in given)


def test_a_region_without_autocast_inside_one_computes_in_float32() -> None:
    q, k, v = tensors()
    expected = attend(q, k, v)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(attend(q, k, v), expected)
    assert attend(q, k, v).dtype == torch.float32


def test_gradients_under_autocast_have_the_dtype_of_the_leaves() -> None:
    leaves = [each.requires_grad_() for each in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*leaves)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    halves = [each.detach().bfloat16().requires_grad_() for each in leaves]
    expected = torch.autograd.grad(attend(*halves).float().sum(), halves)
    for grad, other in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, other.float())


@pytest.mark.parametrize("inside", [False, True], ids=["around the compiled call", "inside it"])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autocast_gives_the_eager_dtype_and_values(
    config: MechanismConfig, inside: bool
) -> None:
    inputs = tensors()

    def region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v, config=config)

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, config=config)

    compiled = torch.compile(region if inside else bare, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        out = compiled(*inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, region(*inputs))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("config", [STA, PER_HEAD], ids=["one window", "per head"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_call_gives_the_eager_values_strides_and_gradients(
    config: cs.STA, training: bool
) -> None:
    leaves = [each.requires_grad_(training) for each in tensors(kv_heads=1)]
    key_mask = padding()

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, config=config, key_mask=mask, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*leaves, key_mask), call(*leaves, key_mask)
    for each, other in zip(actual, expected, strict=True):
        assert torch.equal(each, other)
        assert each.stride() == other.stride()
    if training:
        weights = [torch.randn(each.shape) for each in expected]
        grads = torch.autograd.grad(actual, leaves, weights)
        expected_grads = torch.autograd.grad(expected, leaves, weights)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("fresh_compiler")
def test_an_automatic_tile_compiles_once_per_grid_without_a_warning() -> None:
    config = cs.STA(window_thw=(1, 1, 1), tile_thw="auto")

    def call(q: Tensor) -> Tensor:
        return cs.attention(q, q, q, config, grid_thw=(q.shape[2] // 96, 12, 8))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for frames in (3, 5, 3, 10, 5):
        q = torch.randn(1, 1, 96 * frames, 8)
        assert torch.equal(compiled(q), call(q))
    assert counter.frame_count == 3
