"""Kernels of quantised attention under Triton's interpreter, against the emulation.

All tests of the op run on the CPU (`tests/ops/test_quantized.py`); here is what kernels do on their
own: addresses, chunks, strides and roundings.
"""

from __future__ import annotations

from typing import Any

import pytest
import quantized
import torch
from helpers import Geometry
from quantized import ODD
from quantized import ONE_AXIS
from quantized import assert_emulates
from torch import Tensor

from compiled_sparse.kernels import attention
from compiled_sparse.kernels import quantized_attention
from compiled_sparse.kernels import tuning
from compiled_sparse.ops import gpu_quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory", "gpu_kernels_on_cpu")

SLOW = [
    (torch.float32, "float8"),
    (torch.bfloat16, "float16"),
    (torch.float16, "float8"),
    (torch.float16, "float16"),
]
DIVIDES = Geometry((2, 4, 8), (2, 4, 4), (1, 4, 8))
PUBLISHED = Geometry((150,), (128,), (64,))
PUBLISHED_FOR_SM_90 = Geometry((150,), (64,), (128,))
LARGE = Geometry((4, 8, 7), (4, 8, 7), (4, 8, 6))


def check(
    geometry: Geometry,
    tensors: tuple[Tensor, ...],
    lists: tuple[Tensor, Tensor],
    **keywords: Any,
) -> None:
    actual = quantized.op(geometry, tensors, lists, **keywords)
    assert actual[0].transpose(1, 2).is_contiguous()
    assert_emulates(actual, quantized.reference(geometry, tensors, lists, **keywords), tensors[2])


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float32, "float16"),
        (torch.bfloat16, "float8"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
    ],
    ids=str,
)
def test_text_key_mask_and_grouped_heads(dtype: torch.dtype, values: str) -> None:
    tensors, shown = quantized.hide(ODD.tensors(1, 2, 1, head_dim=64, dtype=dtype))
    check(ODD, tensors, ODD.lists(1, 2), key_mask=shown, values=values)


@pytest.mark.parametrize(
    "geometry",
    [ONE_AXIS, DIVIDES, PUBLISHED, PUBLISHED_FOR_SM_90],
    ids=["keys of another length", "divides", "published", "published for sm_90"],
)
def test_every_kind_of_block(geometry: Geometry) -> None:
    tensors = geometry.tensors(1, 1, head_dim=128, dtype=torch.float16)
    check(geometry, tensors, geometry.lists(), values="float8")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale: float) -> None:
    check(
        ONE_AXIS,
        ONE_AXIS.tensors(1, 1, head_dim=64),
        ONE_AXIS.lists(),
        scale=scale,
        values="float8",
    )


def test_two_batch_entries_and_addresses_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ADDRESS_LIMIT", 1)
    tensors = tuple(
        each.transpose(1, 2).contiguous().transpose(1, 2)
        for each in ONE_AXIS.tensors(2, 2, 1, head_dim=64)
    )
    check(ONE_AXIS, tensors, ONE_AXIS.lists(2, 1), values="float8")


def test_blocks_of_several_chunks_are_near_the_emulation() -> None:
    tensors = LARGE.tensors(1, 1, head_dim=64)
    lists = LARGE.lists()
    out, lse = quantized.op(LARGE, tensors, lists, values="float8")
    wanted, wanted_lse = quantized.reference(LARGE, tensors, lists, values="float8")
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    exact, _ = quantized.reference(LARGE, tensors, lists, values="float16")
    assert float((out - exact).norm()) <= 1.2 * float((wanted - exact).norm())


def test_nan_in_a_visible_key_is_handed_on() -> None:
    q, k, v = ONE_AXIS.tensors(1, 1, head_dim=64)
    k[0, 0, 5, 2] = float("nan")
    rows, blocks = len(ONE_AXIS.q_blocks), len(ONE_AXIS.kv_blocks)
    indices = torch.arange(blocks).expand(1, 1, rows, -1).int()
    counts = torch.full((1, 1, rows), blocks).int()
    out, lse = quantized.op(ONE_AXIS, (q, k, v), (indices, counts))
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())


def test_chips_without_float8_hold_values_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    for chip, expected in {"sm_80": False, "sm_89": True, "sm_120": True, "gfx942": False}.items():
        monkeypatch.setattr(tuning, "current_chip", lambda chip=chip: chip)
        assert quantized_attention.has_float8() is expected
    tensors, lists = ONE_AXIS.tensors(1, 1, head_dim=64), ONE_AXIS.lists()
    results = [quantized.op(ONE_AXIS, tensors, lists, values=v)[0] for v in ("auto", "float16")]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("wish", "has_float8", "expected"),
    [
        ("auto", True, "float8"),
        ("auto", False, "float16"),
        ("float8", True, "float8"),
        ("float16", True, "float16"),
        ("float16", False, "float16"),
    ],
)
def test_what_values_are_held_in(wish: str, has_float8: bool, expected: str) -> None:
    assert gpu_quantized.resolve(wish, has_float8) == expected
