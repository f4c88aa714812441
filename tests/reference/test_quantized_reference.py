"""The reference of quantised attention against exact attention, and against naive loops."""

from __future__ import annotations

import itertools
import math

import helpers
import oracle
import pytest
import quantized
import torch
import torch.nn.functional as F
from helpers import Geometry
from quantized import ODD
from torch import Tensor

SMALL = Geometry((3, 3, 2), (2, 2, 2), (2, 1, 2), text_before=1, text_after=5)
VALUES = ["float8", "float16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMAL = [(1 + m / 8) * 2.0**e for e, m in itertools.product(range(-6, 9), range(8))]
DENORMAL = [m / 8 * 2.0**-6 for m in range(8)]
FLOAT8 = torch.tensor([*DENORMAL, *NORMAL[:-1]], dtype=torch.float64)
"""The numbers of float8_e4m3fn that are not negative, from their definition."""


def nearest_float8(x: Tensor) -> Tensor:
    """Round to the nearest, of two as near to the one with the even code, as a table says."""
    distance = (x.double().abs()[..., None] - FLOAT8).abs()
    code = distance.argmin(-1)
    tie = distance.gather(-1, code[..., None]) == distance.roll(-1, -1).gather(-1, code[..., None])
    code = code + (tie[..., 0] & (code % 2 == 1))
    return (FLOAT8[code] * x.sign()).float()


def codes(rows: Tensor) -> tuple[Tensor, float]:
    """Integers of one block, and their scale."""
    scale = rows.abs().max() / 127 + 1e-7
    ratio = rows / scale
    return torch.where(ratio < 0, -(0.5 - ratio).floor(), (ratio + 0.5).floor()), float(scale)


def loops(
    tensors: tuple[Tensor, ...], geometry: Geometry, lists: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Quantised attention of batch entry 0 and head 0, block by block, row by row."""
    q, k, v = (each[0, 0] for each in tensors)
    mean = (k.float().sum(0) / len(k)).to(k.dtype)
    smooth = (k - mean).float()
    amax = v.float().abs().amax(0)
    values = nearest_float8(v.float() * (2.25 / amax))
    scale = q.shape[-1] ** -0.5
    out, lse = torch.zeros_like(q), torch.full((len(q),), -math.inf)
    for number, rows in enumerate(geometry.q_blocks):
        q8, q_scale = codes(q[rows].float())
        count = int(lists[1][0, 0, number])
        for row, query in zip(rows, q8, strict=True):
            top, total, result = -math.inf, torch.zeros(()), torch.zeros(q.shape[-1])
            for block in lists[0][0, 0, number, :count]:
                keys = geometry.kv_blocks[int(block)]
                k8, k_scale = codes(smooth[keys])
                scores = (k8 @ query) * (q_scale * k_scale * scale * math.log2(math.e))
                new_top = max(top, float(scores.max()))
                weights = torch.exp2(scores - new_top)
                decay = 2.0 ** (top - new_top)
                total = total * decay + weights.sum()
                result = result * decay + nearest_float8(448 * weights) @ values[keys]
                top = new_top
            if count:
                out[row] = (result / (448 * total) * (amax / 2.25)).to(q.dtype)
                share = scale * float(q[row].float() @ mean.float())
                lse[row] = math.log(2) * (top + float(total.log2())) + share
    return out, lse


def test_the_table_of_float8_agrees_with_torch() -> None:
    x = torch.cat([torch.linspace(-440, 440, 4001), torch.randn(4000) * 0.02, FLOAT8.float()])
    assert torch.equal(nearest_float8(x), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_naive_loops_agree(dtype: torch.dtype) -> None:
    tensors = SMALL.tensors(1, 1, head_dim=64, dtype=dtype)
    lists = SMALL.lists()
    out, lse = quantized.reference(SMALL, tensors, lists)
    expected = tuple(each[None, None] for each in loops(tensors, SMALL, lists))
    quantized.assert_emulates((out, lse), (expected[0], expected[1]), tensors[2])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "key mask"])
def test_the_result_points_where_exact_attention_does(
    dtype: torch.dtype, values: str, masked: bool
) -> None:
    tensors = ODD.tensors(heads=4, kv_heads=2, head_dim=64, dtype=dtype)
    lists = ODD.lists(2, 4)
    mask = oracle.list_mask(*lists, ODD.q_blocks, ODD.kv_blocks)
    shown = None
    exact_inputs = tuple(each.double() for each in tensors)
    if masked:
        tensors, shown = quantized.hide(tensors)
    exact, exact_lse = oracle.attention(*exact_inputs, mask, shown, None)
    out, lse = quantized.reference(ODD, tensors, lists, key_mask=shown, values=values)
    assert float(F.cosine_similarity(out.double().flatten(), exact.flatten(), dim=0)) > 0.999
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    seen = exact_lse.isfinite()
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=0, atol=0.05)


@pytest.mark.parametrize("values", VALUES)
def test_values_of_very_different_size_and_keys_far_from_zero_are_kept(values: str) -> None:
    q, k, v = ODD.tensors(head_dim=128)
    factors = torch.logspace(0, 2, 128)
    k, v = k + factors, v * factors
    lists = helpers.full_lists(len(ODD.q_blocks), len(ODD.kv_blocks))
    out, _ = quantized.reference(ODD, (q, k, v), lists, values=values)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    channels = F.cosine_similarity(out.double().flatten(0, 2), exact.flatten(0, 2), dim=0)
    assert float(channels.min()) > 0.99


@pytest.mark.parametrize("values", VALUES)
def test_equal_values_come_out_unchanged(values: str) -> None:
    q, k, v = ODD.tensors(head_dim=64)
    v = v[:, :, :1].expand_as(v)
    lists = helpers.full_lists(len(ODD.q_blocks), len(ODD.kv_blocks))
    out, _ = quantized.reference(ODD, (q, k, v), lists, values=values)
    # Weights are rounded, their sum is not: of each the error is at most 2^-4, on average less.
    torch.testing.assert_close(out, v, rtol=2**-4 if values == "float8" else 1e-3, atol=1e-5)


def test_a_block_of_one_key_gives_its_value() -> None:
    geometry = Geometry((9,), (2,), (1,))
    q, k, v = geometry.tensors(1, 1, head_dim=64)
    indices = torch.arange(5).view(1, 1, 5, 1).int()
    out, lse = quantized.reference(geometry, (q, k, v), (indices, torch.ones(1, 1, 5).int()))
    chosen = v[:, :, torch.arange(9) // 2]
    torch.testing.assert_close(out, chosen, rtol=2**-4, atol=1e-2)
    exact = (q * k[:, :, torch.arange(9) // 2]).sum(-1) / 8
    torch.testing.assert_close(lse, exact, rtol=0, atol=0.05)


def test_a_constant_added_to_all_keys_changes_the_log_sum_exp_alone() -> None:
    q, k, v = ODD.tensors(head_dim=64)
    lists = ODD.lists(2, 3)
    shift = torch.randint(-3, 4, (64,)).float()
    out, lse = quantized.reference(ODD, (q, k, v), lists)
    moved, moved_lse = quantized.reference(ODD, (q, k + shift, v), lists)
    torch.testing.assert_close(moved, out, rtol=0, atol=0.05)
    seen = lse.isfinite()
    share = (q @ shift) / 8
    torch.testing.assert_close((moved_lse - lse)[seen], share[seen], rtol=0, atol=0.02)
