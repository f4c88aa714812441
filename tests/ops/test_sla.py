"""Sparse-linear attention as an op: values, gradients and what is selected."""

from __future__ import annotations

import itertools
import math

import helpers
import pytest
import sla_oracle
import torch
import torch.nn.functional as F
from attending import DTYPES
from attending import Chosen
from attending import Inputs
from attending import Selections
from attending import assert_same_outcome
from attending import cast
from attending import outcome
from attending import over_blhd
from attending import weights_for
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from sla_cases import BOXES
from sla_cases import CASES
from sla_cases import FEATURES
from sla_cases import NAMES
from sla_cases import ORDERS
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

WIDE = torch.float64
PUBLISHED = Case((700,), (128,), (64,), 0.3)


def assert_error_is_that_of_plain_arithmetic(case: Case, inputs: Inputs) -> None:
    """Check against float64 with the blocks that were selected, by the rule of `helpers`."""
    weights, dtype = weights_for(inputs), inputs[0].dtype
    with Selections() as selections:
        actual = outcome(sla(case), inputs, weights, NAMES)
    (chosen,) = selections.chosen
    exact = outcome(loops(case, chosen), cast(inputs, WIDE), weights, NAMES)
    plain = plain_outcomes(case, chosen, inputs, weights)
    wide = ("lse", "grad_weight", "grad_bias")
    for name, result in actual.items():
        assert result.dtype == (torch.float32 if name in wide else dtype), name
        helpers.assert_error_within_budget(name, result, exact[name], *(p[name] for p in plain))


def plain_outcomes(
    case: Case, chosen: Chosen, inputs: Inputs, weights: tuple[Tensor, Tensor]
) -> list[dict[str, Tensor]]:
    """The same in low precision: textbook attention, and the linear branch as published."""
    dtype, mask = inputs[0].dtype, sla_oracle.mask(chosen, case)
    qkv = tuple(each.detach() for each in inputs[:3])
    choices = itertools.product(("queries", "keys", "scores"), (math.e, 2.0))
    results = []
    for (factor_on, base), order in zip(choices, 2 * ORDERS, strict=True):
        rounding = (factor_on, base, False)
        sparse = helpers.textbook(qkv, weights, mask, case.key_mask, case.scale, rounding)
        linear, *grads = linear_outcome(case, inputs, weights[0], order)
        shares = zip(NAMES, grads, strict=True)
        summed = {name: sparse.get(name, 0) + share for name, share in shares}
        out = (sparse["out"].float() + linear.float()).to(dtype)
        results.append({"out": out, "lse": sparse["lse"], **summed})
    return results


def linear_outcome(case: Case, inputs: Inputs, weight: Tensor, order: str) -> list[Tensor]:
    """The linear branch as published, and its gradients."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    linear = published_linear(*leaves[:3], case, leaves[3], leaves[4], order)
    return [linear.detach(), *torch.autograd.grad(linear, leaves, weight.to(linear.dtype))]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize(
    "case",
    [*CASES.values(), pytest.param(PUBLISHED, marks=pytest.mark.slow)],
    ids=[*CASES, "published blocks"],
)
def test_the_error_is_that_of_plain_arithmetic(
    case: Case, feature_map: str, dtype: torch.dtype
) -> None:
    case = case._replace(feature_map=feature_map)
    assert_error_is_that_of_plain_arithmetic(case, tensors(case, dtype=dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("case", [BOXES, RUNS], ids=["boxes", "runs"])
def test_padding_grouped_heads_and_scale_keep_that_error(
    case: Case, feature_map: str, dtype: torch.dtype
) -> None:
    case = case._replace(key_mask=padding(case), scale=0.4, feature_map=feature_map)
    assert_error_is_that_of_plain_arithmetic(case, tensors(case, heads=4, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_long_sequence_of_wide_heads_keeps_that_error(
    dtype: torch.dtype, feature_map: str
) -> None:
    case = Case((2000,), (128,), (64,), 0.2, feature_map=feature_map)
    inputs = tensors(case, heads=1, kv_heads=1, batch=1, head_dim=64, dtype=dtype)
    assert_error_is_that_of_plain_arithmetic(case, inputs)


@given(layouts(), st.floats(1e-6, 1), st.booleans(), st.sampled_from(FEATURES), st.data())
@settings(max_examples=25)
def test_any_layout_gives_what_the_reference_gives(
    layout: BlockLayout, ratio: float, masked: bool, feature_map: str, data: st.DataObject
) -> None:
    k_tile = tuple(data.draw(st.integers(1, extent + 2)) for extent in layout.grid)
    text = (layout.text_before, layout.text_after) if len(layout.grid) > 1 else (0, 0)
    case = Case(layout.grid, layout.tile, k_tile, ratio, text, feature_map)
    case = case._replace(key_mask=torch.rand(2, case.length) < 0.5 if masked else None)
    inputs = tensors(case, head_dim=3, dtype=WIDE)
    assert_same_outcome(sla(case), sla(case, cs.reference), inputs, NAMES)


@pytest.mark.parametrize("residue", range(8))
@pytest.mark.parametrize("tile", [(8, 4), (4, 8), (8, 8)], ids=str)
def test_every_length_of_the_last_block_gives_what_the_reference_gives(
    tile: tuple[int, int], residue: int
) -> None:
    for kept in (0.05, 0.4, 1.0):
        case = Case((24 + residue,), tile[:1], tile[1:], kept)
        inputs = tensors(case)
        weights = weights_for(inputs)
        actual = outcome(sla(case), inputs, weights, NAMES)
        expected = outcome(sla(case, cs.reference), cast(inputs, WIDE), weights, NAMES)
        for name, each in actual.items():
            error = (each.double() - expected[name]).abs().max()
            assert error <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("given_inputs", [3, 4, 5], ids=["sparse", "weight", "weight and bias"])
def test_gradcheck_agrees_in_float64(given_inputs: int, masked: bool, feature_map: str) -> None:
    case = Case((3, 5), (2, 2), (1, 3), 0.5, (1, 2), feature_map)
    case = case._replace(key_mask=padding(case) if masked else None)
    inputs = tensors(case, heads=2, kv_heads=1, head_dim=3, dtype=WIDE)[:given_inputs]
    assert torch.autograd.gradcheck(sla(case), inputs, fast_mode=True)


def test_the_selection_passes_no_gradient_on() -> None:
    case = Case((60,), (8,), (4,), 0.1)
    inputs = tensors(case)[:3]
    with Selections() as selections:
        out, _ = sla(case)(*inputs)
    (chosen,) = selections.chosen
    (grad,) = torch.autograd.grad(out[0, 0, case.q_blocks[2]].sum(), inputs[1])
    for block, tokens in enumerate(case.k_blocks):
        assert bool((grad[0, 0, tokens] != 0).any()) == (block in chosen[0][0][2])


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_one_input_alone_may_want_a_gradient(wanted: int) -> None:
    inputs = tensors(BOXES)
    everything = torch.autograd.grad(sla(BOXES)(*inputs)[0].square().sum(), inputs)
    for number, each in enumerate(inputs):
        each.requires_grad_(number == wanted)
    out = sla(BOXES, return_lse=False)(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[wanted])
    torch.testing.assert_close(grad, everything[wanted])


def test_all_blocks_without_or_with_a_projection_of_zeros_are_dense() -> None:
    case = CASES["all blocks"]
    q, k, v, weight, bias = tensors(case, dtype=WIDE)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sla(case)(q, k, v)[0], dense)
    zeros = torch.zeros_like(weight), torch.zeros_like(bias)
    torch.testing.assert_close(sla(case)(q, k, v, *zeros)[0], dense)
    assert not torch.allclose(sla(case)(q, k, v, weight, bias)[0], dense)
    without = sla(case, config=config_of(case, proj=None))
    torch.testing.assert_close(without(q, k, v)[0], dense)


def test_a_projection_of_zeros_learns() -> None:
    q, k, v, weight, bias = tensors(RUNS)
    zeros = [torch.zeros_like(each).requires_grad_() for each in (weight, bias)]
    out, _ = sla(RUNS)(q.detach(), k.detach(), v.detach(), *zeros)
    grads = torch.autograd.grad(out.square().sum(), zeros)
    assert all(bool((grad != 0).any()) for grad in grads)


def test_text_has_its_part_in_the_linear_branch() -> None:
    inputs = tensors(BOXES)
    out, lse = sla(BOXES)(*inputs)
    alone, alone_lse = sla(BOXES)(*inputs[:3])
    share = sla_oracle.attention(*cast(inputs, WIDE)[:3], BOXES, *cast(inputs, WIDE)[3:]).linear
    torch.testing.assert_close((out - alone).double(), share, rtol=1e-4, atol=1e-5)
    assert torch.equal(lse, alone_lse)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_masked_keys_hold_never_matters(
    dtype: torch.dtype, feature_map: str, bad: float
) -> None:
    key_mask = padding(BOXES)
    key_mask[1] = False
    case = BOXES._replace(key_mask=key_mask, feature_map=feature_map)
    inputs = tensors(case, dtype=dtype)
    weights = weights_for(inputs)
    results = []
    for fill in (0.0, bad):
        leaves = [each.detach().clone() for each in inputs]
        for each in leaves[1:3]:
            each.masked_fill_(~key_mask[:, None, :, None], fill)
        leaves = [each.requires_grad_() for each in leaves]
        results.append(outcome(sla(case), leaves, weights, NAMES))
    for name, each in results[1].items():
        assert not each.isnan().any(), name
        assert torch.equal(each, results[0][name]), name
    hidden = results[1]["out"][1]
    assert torch.equal(hidden, inputs[4].detach().to(dtype).expand_as(hidden))
    assert bool((results[1]["lse"][1] == -math.inf).all())
    for name in ("grad_k", "grad_v"):
        assert not (results[1][name].masked_select(~key_mask[:, None, :, None])).any()


@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("value", [0.0, -60.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_features_give_numbers(dtype: torch.dtype, value: float, feature_map: str) -> None:
    case = RUNS._replace(feature_map=feature_map)
    q, k, v, *proj = tensors(case, dtype=dtype)
    constant = [torch.full_like(each, value).requires_grad_() for each in (q, k)]
    inputs = [*constant, v, *proj]
    for name, each in outcome(sla(case), inputs, weights_for(inputs), NAMES).items():
        assert bool(each.isfinite().all()), name


def test_sums_beyond_float16_are_taken_in_float32() -> None:
    case = Case((3000,), (128,), (64,), 0.2, feature_map="elu")
    q, k, v, *proj = tensors(case, heads=1, kv_heads=1, batch=1, dtype=torch.float16)
    with torch.no_grad():
        inputs = [q.abs() * 4 + 4, k.abs() * 4 + 4, v.abs() + 2, *proj]
        out, _ = sla(case)(*inputs)
        expected, _ = sla(case, cs.reference)(*inputs)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out, expected, rtol=5e-3, atol=5e-3)


def test_an_empty_batch_gives_an_empty_output_and_gradients() -> None:
    inputs = [each.detach()[:0].requires_grad_() for each in tensors(BOXES)[:3]]
    inputs += tensors(BOXES)[3:]
    out, _ = sla(BOXES)(*inputs)
    assert out.shape == inputs[0].shape
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [each.shape for each in inputs]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("head_dim", [1, 5, 65])
def test_any_head_size_agrees_with_the_loops(head_dim: int) -> None:
    inputs = tensors(BOXES, head_dim=head_dim, dtype=WIDE)
    assert_same_outcome(sla(BOXES), loops(BOXES), inputs, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_strides_of_inputs_do_not_matter(masked: bool, dtype: torch.dtype) -> None:
    case = BOXES._replace(key_mask=padding(BOXES) if masked else None)
    inputs = tensors(case, dtype=dtype)
    weights = weights_for(inputs)
    expected = outcome(sla(case), inputs, weights, NAMES)
    proj = [each.detach() for each in inputs[3:]]
    strided = [proj[0].t().contiguous().t(), torch.stack([proj[1], proj[1]], dim=1)[:, 0]]
    sliced = [torch.cat([each, each], dim=3)[..., :8] for each in cast(inputs[:3], dtype)]
    for others in (list(map(over_blhd, inputs[:3])), sliced):
        others = [each.detach().requires_grad_() for each in (*others, *strided)]
        actual = outcome(sla(case), others, weights, NAMES)
        for name, each in actual.items():
            torch.testing.assert_close(each, expected[name])
        for kind in (others, others[:3]):
            assert sla(case)(*kind)[0].transpose(1, 2).is_contiguous()


def test_expanded_heads_and_batches_are_read_as_what_they_are() -> None:
    q, k, v, *proj = (each.detach() for each in tensors(BOXES))
    expanded = [each[:1, :1].expand(2, 2, -1, -1) for each in (k, v)]
    expected = sla(BOXES)(q, *(each.contiguous() for each in expanded), *proj)
    for each, other in zip(sla(BOXES)(q, *expanded, *proj), expected, strict=True):
        torch.testing.assert_close(each, other)


def test_batch_entries_do_not_see_each_other() -> None:
    q, k, v, *proj = (each.detach() for each in tensors(BOXES))
    both = sla(BOXES)(q, k, v, *proj)
    for number in range(2):
        alone = sla(BOXES)(*(each[number : number + 1] for each in (q, k, v)), *proj)
        for each, other in zip(alone, both, strict=True):
            torch.testing.assert_close(each, other[number : number + 1])
