"""The reference of sparse-linear attention against loops over tokens that share no code with it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import sla_cases
import sla_oracle
import torch
import torch.nn.functional as F
from attending import assert_same_outcome
from attending import outcome
from attending import weights_for
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from sla_cases import BOXES
from sla_cases import CASES
from sla_cases import FEATURES
from sla_cases import NAMES
from sla_cases import RUNS
from sla_cases import config_of
from sla_cases import loops
from sla_cases import padding
from sla_cases import published_linear
from sla_cases import sla
from sla_cases import tensors
from sla_oracle import Case
from strategies import layouts
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.layout import BlockLayout
from compiled_sparse.reference.sla import linear_attention

WIDE = torch.float64
LOW = [torch.bfloat16, torch.float16]


def reference(case: Case) -> sla_cases.Attend:
    """The reference with the arguments of a case."""
    return sla(case, cs.reference)


@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_match_the_loops(case: Case, feature_map: str) -> None:
    case = case._replace(feature_map=feature_map)
    inputs = tensors(case, dtype=WIDE)
    assert_same_outcome(reference(case), loops(case), inputs, NAMES)
    assert_same_outcome(reference(case), loops(case), inputs[:4], NAMES)
    assert_same_outcome(reference(case), loops(case), inputs[:3], NAMES)


@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_padding_grouped_heads_and_scale_match_the_loops(case: Case, feature_map: str) -> None:
    case = case._replace(feature_map=feature_map, key_mask=padding(case), scale=0.4)
    inputs = tensors(case, kv_heads=1, dtype=WIDE)
    assert_same_outcome(reference(case), loops(case), inputs, NAMES)


@given(layouts(), st.floats(1e-6, 1), st.booleans(), st.sampled_from(FEATURES), st.data())
@settings(max_examples=30)
def test_any_layout_and_ratio_matches_the_loops(
    layout: BlockLayout, ratio: float, masked: bool, feature_map: str, data: st.DataObject
) -> None:
    k_tile = tuple(data.draw(st.integers(1, extent + 2)) for extent in layout.grid)
    text = (layout.text_before, layout.text_after) if len(layout.grid) > 1 else (0, 0)
    case = Case(layout.grid, layout.tile, k_tile, ratio, text, feature_map)
    if masked:
        case = case._replace(key_mask=torch.rand(1, case.length) < 0.5)
    inputs = [each.detach() for each in tensors(case, batch=1, head_dim=4, dtype=WIDE)]
    for each, other in zip(reference(case)(*inputs), loops(case)(*inputs), strict=True):
        torch.testing.assert_close(each, other)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("case", [RUNS, BOXES], ids=["runs", "boxes"])
def test_low_precision_selects_as_the_loops_do_and_rounds_once(
    case: Case, dtype: torch.dtype
) -> None:
    inputs = [each.detach() for each in tensors(case, dtype=dtype)[:3]]
    out, lse = reference(case)(*inputs)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    wide = [each.to(WIDE) for each in inputs]
    expected = sla_oracle.attention(*wide, case, rounding=dtype)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out.double(), expected.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_the_linear_branch_is_the_published_sequence_of_operations(
    has_bias: bool, feature_map: str, dtype: torch.dtype
) -> None:
    case = RUNS._replace(feature_map=feature_map)
    inputs = [each.detach() for each in tensors(case, dtype=dtype)]
    q, k, v, weight, bias = inputs
    projection = (weight, bias if has_bias else None)
    actual = linear_attention(q, k, v, feature_map, projection)
    expected = published_linear(q, k, v, case, *projection)
    assert actual.dtype == expected.dtype
    # A sum in another order may be rounded to the next number, in a few elements of many.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    arithmetic = 0.0 if dtype == torch.bfloat16 else 4 * torch.finfo(actual.dtype).eps
    is_same = (actual - expected).abs() <= arithmetic * expected.abs().max()
    assert float(is_same.double().mean()) > 0.97


def test_rounding_the_linear_branch_shows() -> None:
    q, k, v, weight, bias = (each.detach() for each in tensors(RUNS, dtype=torch.bfloat16))
    rounded = linear_attention(q, k, v, "softmax", (weight, bias))
    exact = linear_attention(q.double(), k.double(), v.double(), "softmax", (weight, bias))
    assert 1e-3 < float((rounded.double() - exact).abs().max()) < 5e-2


def test_the_branches_are_added_in_low_precision_and_float16_once() -> None:
    for dtype in LOW:
        inputs = [each.detach() for each in tensors(RUNS, dtype=dtype)]
        sparse, _ = reference(RUNS)(*inputs[:3])
        linear = linear_attention(*inputs[:3], "softmax", (inputs[3], inputs[4]))
        assert linear.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        expected = (sparse.float() + linear.float()).to(dtype)
        assert torch.equal(reference(RUNS)(*inputs)[0], expected)


def test_all_blocks_without_a_linear_branch_are_dense_attention() -> None:
    case = CASES["all blocks"]
    q, k, v, weight, bias = tensors(case, dtype=WIDE)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(reference(case)(q, k, v)[0], dense)
    zeros = torch.zeros_like(weight), torch.zeros_like(bias)
    torch.testing.assert_close(reference(case)(q, k, v, *zeros)[0], dense)
    assert not torch.allclose(reference(case)(q, k, v, weight, bias)[0], dense)
    without = sla(case, cs.reference, config=config_of(case, proj=None))
    torch.testing.assert_close(without(q, k, v)[0], dense)


def visible_blocks(case: Case, **changes: float) -> set[int]:
    """Return how many key blocks reach the output of any query block."""
    q, k, v = tensors(case, batch=1, dtype=WIDE)[:3]
    out, _ = sla(case, cs.reference, **changes)(q, k, v)
    counts = set()
    for token in (tokens[0] for tokens in case.q_blocks):
        (grad,) = torch.autograd.grad(out[0, 0, token].sum(), v, retain_graph=True)
        counts.add(sum(bool((grad[0, 0, tokens] != 0).all()) for tokens in case.k_blocks))
    return counts


@pytest.mark.parametrize(
    ("blocks", "ratio", "kept"),
    [(100, 0.29, 28), (10, 0.1, 1), (10, 0.05, 1), (10, 0.99, 9), (10, 1.0, 10), (20, 0.15, 3)],
)
def test_the_number_of_blocks_is_cut_off_but_never_none(
    blocks: int, ratio: float, kept: int
) -> None:
    case = Case((2 * blocks - 1,), (2 * blocks,), (2,), ratio)
    assert visible_blocks(case) == {kept}
    assert replace(config_of(case), topk_ratio=0.5).with_sparsity(0.0) == config_of(
        case._replace(ratio=1.0)
    )


def test_a_sparsity_of_nine_tenths_keeps_what_a_ratio_of_one_tenth_keeps() -> None:
    case = Case((40,), (40,), (2,), 0.5)
    assert visible_blocks(case, sparsity=0.9) == visible_blocks(case._replace(ratio=0.1)) == {2}


def test_of_equal_scores_the_first_blocks_are_taken() -> None:
    case = Case((40,), (8,), (4,), 0.4)
    _, k, v, _, _ = tensors(case)
    out, _ = reference(case)(torch.zeros_like(k), k, v)
    torch.testing.assert_close(out, v[:, :, :16].mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("feature_map", FEATURES)
def test_what_masked_keys_hold_never_matters(bad: float, feature_map: str) -> None:
    key_mask = padding(BOXES)
    key_mask[1] = False
    case = BOXES._replace(key_mask=key_mask, feature_map=feature_map)
    inputs = tensors(case)
    weights = weights_for(inputs)
    results = []
    for fill in (0.0, bad):
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        for each in leaves[1:3]:
            each.data.masked_fill_(~key_mask[:, None, :, None], fill)
        results.append(outcome(reference(case), leaves, weights, NAMES))
    for name, each in results[1].items():
        torch.testing.assert_close(each, results[0][name])
    bias = inputs[4].detach()
    torch.testing.assert_close(results[1]["out"][1], bias.expand_as(results[1]["out"][1]))


def test_it_can_be_differentiated_twice() -> None:
    case = Case((6,), (3,), (2,), 0.4)
    leaves = tensors(case, batch=1, head_dim=2, dtype=WIDE)

    def small(*inputs: Tensor) -> Tensor:
        return reference(case)(*inputs)[0]

    assert torch.autograd.gradcheck(small, leaves)
    assert torch.autograd.gradgradcheck(small, leaves)
