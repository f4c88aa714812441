"""The reference against naive loops that share no code with it."""

from __future__ import annotations

import inspect
from typing import Any

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings
from strategies import layouts_with_windows
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.reference.attention import token_mask

GRID, TILE, TEXT = (5, 7, 3), (2, 3, 2), cs.Text(4, 9)
LENGTH = 118
STA = cs.STA(window_thw=((1, 3, 1), (3, 1, 1), (2, 2, 1)), tile_thw=TILE)
WINDOWS = STA.windows
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(dtype: torch.dtype = torch.float64, kv_heads: int = 3) -> list[Tensor]:
    return [torch.randn(2, heads, LENGTH, 8).to(dtype) for heads in (3, kv_heads, kv_heads)]


def reference(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"config": STA, "grid_thw": GRID, "text": TEXT, **changes}
    return cs.reference.attention(q, k, v, **arguments)


def naive_mask() -> Tensor:
    return oracle.sta_mask(GRID, TILE, WINDOWS, TEXT.before, TEXT.after)[None]


@given(layouts_with_windows())
def test_the_mask_equals_naive_loops(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    text = cs.Text(layout.text_before, layout.text_after)
    config = cs.STA(window_thw=windows, tile_thw=layout.tile)
    length = layout.num_tokens
    mask = token_mask(config, slice(None), length, length, layout.grid, text)
    expected = oracle.sta_mask(layout.grid, layout.tile, windows, text.before, text.after)
    assert torch.equal(mask, expected[None])
    assert sta_density(layout, windows) == pytest.approx(mask.double().mean().item())


def test_the_mask_equals_naive_loops_on_every_axis() -> None:
    for num_tiles in range(1, 13):
        for nominal in range(1, 16):
            config = cs.STA(window_thw=(nominal,), tile_thw=(1,))
            mask = token_mask(config, slice(None), num_tiles, num_tiles, (num_tiles,), cs.Text())
            seen = [row.nonzero()[:, 0].tolist() for row in mask[0, 0]]
            expected = [oracle.window(num_tiles, nominal, tile) for tile in range(num_tiles)]
            assert seen == expected, (num_tiles, nominal)


@pytest.mark.parametrize("window", [1, 2, 5, 9])
@pytest.mark.parametrize("block", [1, 7, 32, 200])
def test_blocks_see_themselves_and_those_just_before_them(block: int, window: int) -> None:
    config = cs.SWBA(block=block, window=window)
    mask = token_mask(config, slice(None), LENGTH, LENGTH, None, cs.Text())
    assert torch.equal(mask, token_mask(config, slice(None), LENGTH, LENGTH, GRID, TEXT))
    for query, row in enumerate(mask[0, 0]):
        first = max(0, query // block - window + 1) * block
        behind = min(LENGTH, (query // block + 1) * block)
        assert row.nonzero()[:, 0].tolist() == list(range(first, behind))


def test_a_range_of_rows_is_that_part_of_the_mask() -> None:
    rows = slice(20, 71)
    mask = token_mask(STA, rows, LENGTH, LENGTH, GRID, TEXT)
    assert torch.equal(mask, naive_mask()[:, :, rows])


def test_the_dense_mask_hides_nothing() -> None:
    mask = token_mask(cs.Dense(), slice(2, 5), 7, 9, None, cs.Text())
    assert mask.shape == (1, 1, 3, 9)
    assert bool(mask.all())


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_the_oracle(dtype: torch.dtype, masked: bool) -> None:
    key_mask = torch.rand(2, LENGTH) < 0.7 if masked else None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference(q, k, v, key_mask=key_mask, scale=0.4, return_lse=True)

    inputs = tensors(dtype, kv_heads=1)
    helpers.assert_matches_oracle(attention, *inputs, naive_mask(), key_mask=key_mask, scale=0.4)


@given(layouts_with_windows())
@settings(max_examples=20)
def test_any_layout_matches_the_oracle(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    text = cs.Text(layout.text_before, layout.text_after)
    q, k, v = torch.randn(3, 1, len(windows), layout.num_tokens, 4, dtype=torch.float64)
    config = cs.STA(window_thw=windows, tile_thw=layout.tile)
    arguments: dict[str, Any] = {"config": config, "grid_thw": layout.grid, "text": text}
    out, lse = reference(q, k, v, **arguments, return_lse=True)
    mask = oracle.sta_mask(layout.grid, layout.tile, windows, text.before, text.after)[None]
    expected_out, expected_lse = oracle.attention(q, k, v, mask)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_dtypes_are_those_of_the_values_and_of_the_arithmetic() -> None:
    for dtype, compute in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out, lse = reference(*tensors(dtype), return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == compute


def test_queries_are_processed_in_chunks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors()
    key_mask = torch.rand(2, LENGTH) < 0.7
    whole = reference(*inputs, key_mask=key_mask, return_lse=True)
    module = inspect.getmodule(token_mask)
    monkeypatch.setattr(module, "_QUERY_CHUNK", 17)
    for each, other in zip(
        reference(*inputs, key_mask=key_mask, return_lse=True), whole, strict=True
    ):
        torch.testing.assert_close(each, other)


def test_more_queries_than_one_chunk_match_the_oracle() -> None:
    q, k, v = torch.randn(3, 1, 1, 1100, 4, dtype=torch.float64)
    config = cs.STA(window_thw=(3,), tile_thw=(64,))
    out = reference(q, k, v, config=config, grid_thw=(1100,), text=None)
    mask = oracle.sta_mask((1100,), (64,), ((3,),))[None]
    torch.testing.assert_close(out, oracle.attention(q, k, v, mask)[0])


def test_dense_equals_scaled_dot_product_attention_for_any_lengths() -> None:
    q, k, v = tensors()
    out = cs.reference.attention(q, k[:, :, :50], v[:, :, :50], cs.Dense(), scale=0.3)
    expected = F.scaled_dot_product_attention(q, k[:, :, :50], v[:, :, :50], scale=0.3)
    torch.testing.assert_close(out, expected)


def test_a_query_without_a_key_gives_zero_minus_infinity_and_finite_gradients() -> None:
    leaves = [each.requires_grad_() for each in tensors()]
    key_mask = torch.ones(2, LENGTH, dtype=torch.bool)
    key_mask[1] = False
    out, lse = reference(*leaves, key_mask=key_mask, return_lse=True)
    assert bool((out[1] == 0).all())
    assert bool((lse[1] == float("-inf")).all())
    assert bool(lse[0].isfinite().all())
    grads = torch.autograd.grad(out.sum() + lse[0].sum(), leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert all(bool((grad[1] == 0).all()) for grad in grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_masked_keys_hold_never_matters(bad: float) -> None:
    q, k, v = tensors()
    key_mask = torch.rand(2, LENGTH) < 0.7
    hidden = ~key_mask[:, None, :, None]
    results = []
    for fill in (0.0, bad):
        leaves = [q, k.masked_fill(hidden, fill), v.masked_fill(hidden, fill)]
        leaves = [each.detach().requires_grad_() for each in leaves]
        out, lse = reference(*leaves, key_mask=key_mask, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_can_be_differentiated_twice() -> None:
    config = cs.STA(window_thw=(1,), tile_thw=(2,))
    leaves = [torch.randn(1, 1, 5, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(q, k, v, config=config, grid_thw=(4,), text=cs.Text(after=1))

    assert torch.autograd.gradcheck(small, leaves)
    assert torch.autograd.gradgradcheck(small, leaves)


def test_the_signature_is_that_of_the_package_function() -> None:
    package = inspect.signature(cs.attention).parameters
    mine = inspect.signature(cs.reference.attention).parameters
    assert list(package) == list(mine)
    for name, parameter in package.items():
        assert (parameter.kind, parameter.default) == (mine[name].kind, mine[name].default)


def overridden() -> cs.reference.override:
    return cs.reference.override(STA, grid_thw=GRID, text=TEXT)


def test_override_replaces_attention_over_the_layout() -> None:
    q, k, v = tensors()
    with overridden() as mode:
        out = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert mode.num_replaced == 1
    assert torch.equal(out, reference(q, k, v, scale=0.3))


def test_override_hands_on_key_padding_and_grouped_heads() -> None:
    q, k, v = tensors(kv_heads=1)
    key_mask = torch.rand(2, LENGTH) < 0.7
    with overridden():
        out = F.scaled_dot_product_attention(q, k, v, key_mask[:, None, None], enable_gqa=True)
        shared = F.scaled_dot_product_attention(q, k, v, key_mask[:1, None, None], enable_gqa=True)
    assert torch.equal(out, reference(q, k, v, key_mask=key_mask))
    assert torch.equal(shared, reference(q, k, v, key_mask=key_mask[:1].expand(2, -1)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"attn_mask": torch.linspace(-1e5, 0, LENGTH**2, dtype=torch.float64).view(LENGTH, -1)},
        {"attn_mask": torch.ones(2, 1, LENGTH, LENGTH).tril().bool()},
        {"attn_mask": torch.linspace(-1, 0, LENGTH, dtype=torch.float64)[None]},
        {"attn_mask": torch.full((1, LENGTH), -100.0, dtype=torch.float64)},
        {"attn_mask": torch.arange(3 * LENGTH).view(1, 3, 1, -1) % 7 > 2},
        {
            "attn_mask": torch.full((LENGTH, LENGTH), -1e4, dtype=torch.float64).masked_fill(
                (torch.arange(LENGTH) > 3)[:, None] & (torch.arange(LENGTH) > 5), 0.0
            )
        },
    ],
    ids=[
        "causal",
        "additive",
        "per query",
        "additive per key",
        "weak bias",
        "per head",
        "additive outer product",
    ],
)
def test_override_leaves_what_the_compiler_would_leave(arguments: dict[str, Any]) -> None:
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    with overridden() as mode:
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, **arguments), expected)
    assert mode.num_replaced == 0


@pytest.mark.parametrize("number", [None, float("-inf"), -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("expanded", [False, True])
def test_override_knows_key_padding_however_it_is_written(
    number: float | None, expanded: bool
) -> None:
    q, k, v = tensors()
    key_mask = torch.rand(2, LENGTH) < 0.7
    mask = key_mask[:, None, None]
    if number is not None:
        mask = torch.where(mask, 0.0, number).double()
    if expanded:
        mask = mask.expand(2, q.shape[1], LENGTH, LENGTH)
    with overridden() as mode:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    assert mode.num_replaced == 1
    assert torch.equal(out, reference(q, k, v, key_mask=key_mask))


@pytest.mark.parametrize("is_additive", [False, True])
def test_override_gives_zeros_for_queries_an_outer_product_leaves_out(is_additive: bool) -> None:
    q, k, v = tensors()
    keys, queries = torch.rand(2, 2, LENGTH) < 0.7
    mask = queries[:, None, :, None] & keys[:, None, None]
    if is_additive:
        mask = torch.where(mask, 0.0, float("-inf")).double()
    with overridden() as mode:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    assert mode.num_replaced == 1
    expected = reference(q, k, v, key_mask=keys)
    assert torch.equal(out, expected.masked_fill(~queries[:, None, :, None], 0.0))


def test_override_takes_a_finite_bias_on_all_keys_for_none() -> None:
    q, k, v = tensors()
    mask = torch.tensor([0.0, -1e4], dtype=torch.float64)[:, None, None, None]
    with overridden() as mode:
        out = F.scaled_dot_product_attention(q, k, v, mask.expand(2, 1, 1, LENGTH))
    assert mode.num_replaced == 1
    assert torch.equal(out, reference(q, k, v))


def test_override_leaves_dropout_other_lengths_and_other_ranks() -> None:
    q, k, v = tensors()
    with overridden() as mode:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9])
        F.scaled_dot_product_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9])
        F.scaled_dot_product_attention(q[0], k[0], v[0])
    assert mode.num_replaced == 0


def test_override_ends_with_its_block() -> None:
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v)
    with overridden() as mode:
        pass
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
    assert mode.num_replaced == 0
