"""Attention kernels under Triton's interpreter, every way they can be cut, on few and odd tokens.

All tests of the op run on these kernels too, in the slow set (`tests/ops/test_block_sparse.py`).
"""

from __future__ import annotations

from typing import Any

import helpers
import oracle
import pytest
import torch
from helpers import Geometry
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.kernels import attention
from compiled_sparse.kernels import launch
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.tuning import Tile

pytestmark = pytest.mark.usefixtures("poisoned_memory", "gpu_kernels_on_cpu")

DTYPES = [torch.float32, torch.float16]
TEXT = Geometry((3, 5, 3), (2, 3, 2), (2, 2, 3), text_before=5, text_after=14)
ONE_AXIS = Geometry((29,), (8,), (5,), key_length=40)
LARGE_TILES = Geometry((4, 5, 4), (3, 5, 4), (4, 4, 4))
POWERS_OF_TWO = Geometry((3, 5, 7), (2, 4, 4), (2, 2, 4), text_before=3, text_after=21)
DIVIDES = Geometry((2, 4, 8), (2, 4, 4), (1, 4, 4))

SMALL_STEPS = Tile(own=16, other=16, warps=4, stages=1)
PAIRS = Tile(own=16, other=32, warps=4, stages=1, joined=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    names: list[str] = []
    run = launch.run

    def record(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "run", record)
    return names


def cut(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    """Let every kernel use one tile."""
    for kernel in tuning.KERNELS:
        monkeypatch.setitem(tuning._demanded, kernel, tile)


def check(
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 16,
    key_mask: bool = False,
    scale: float | None = None,
    gradients: bool = True,
) -> None:
    """Compare the op with the float64 loops."""
    tensors = geometry.tensors(1, heads, kv_heads, head_dim=head_dim, dtype=dtype)
    lists = geometry.lists(1, heads)
    mask = oracle.list_mask(*lists, geometry.q_blocks, geometry.kv_blocks)
    shown = torch.rand(1, tensors[1].shape[2]) < 0.7 if key_mask else None

    def op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cs.ops.block_sparse_attention(
            q, k, v, *lists, key_mask=shown, scale=scale, **geometry.arguments()
        )

    helpers.assert_matches_oracle(
        op, *tensors, mask, key_mask=shown, scale=scale, gradients=gradients, rounded=True
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_text_key_mask_and_grouped_heads(dtype: torch.dtype, launched: list[str]) -> None:
    check(TEXT, dtype, heads=2, kv_heads=1, key_mask=True)
    assert {"attention_forward", "attention_backward_queries", "attention_backward_keys"} < set(
        launched
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_another_length(dtype: torch.dtype) -> None:
    check(ONE_AXIS, dtype, head_dim=24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_larger_than_a_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, SMALL_STEPS)
    check(LARGE_TILES, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_blocks_in_one_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, PAIRS)
    check(TEXT, dtype)


@pytest.mark.parametrize("geometry", [POWERS_OF_TWO, DIVIDES], ids=["partial, text", "divides"])
def test_boxes_by_the_bulk_copy_engine(
    geometry: Geometry, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuning.BOXES_VARIABLE, "1")
    check(geometry, torch.float16, heads=2, kv_heads=1, head_dim=24, gradients=False)
    assert "attention_forward_boxes" in launched
    assert "attention_forward" not in launched


@pytest.mark.slow
def test_boxes_smaller_than_a_tile(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.BOXES_VARIABLE, "1")
    cut(monkeypatch, SMALL_STEPS)
    geometry = Geometry((5, 7, 9), (4, 2, 4), (4, 4, 4))
    check(geometry, torch.float16, gradients=False)
    assert "attention_forward_boxes" in launched


@pytest.mark.parametrize(
    ("geometry", "dtype", "key_mask"),
    [
        (LARGE_TILES, torch.float32, False),
        (LARGE_TILES, torch.float16, True),
        (Geometry((3, 5, 4), (3, 5, 4), (3, 5, 4)), torch.float16, False),
    ],
    ids=["float32", "key mask", "sides that are no powers of two"],
)
def test_what_boxes_cannot_do_is_done_by_rows(
    geometry: Geometry,
    dtype: torch.dtype,
    key_mask: bool,
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(tuning.BOXES_VARIABLE, "1")
    check(geometry, dtype, key_mask=key_mask, gradients=False)
    assert "attention_forward" in launched


def test_addresses_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ADDRESS_LIMIT", 1)
    check(TEXT, torch.float32)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(scale: float) -> None:
    check(ONE_AXIS, torch.float32, scale=scale)


def test_float64_is_not_rounded_on_the_way() -> None:
    q, k, v = TEXT.tensors(1, 1, 1, head_dim=16, dtype=torch.float64)
    lists = helpers.full_lists(len(TEXT.q_blocks), len(TEXT.kv_blocks))
    out, _ = cs.ops.block_sparse_attention(q, k, v, *lists, **TEXT.arguments())
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("expanded", ["indices", "counts"])
def test_one_of_the_two_lists_may_be_expanded(expanded: str) -> None:
    geometry = Geometry((13,), (4,), (5,), text_after=3)
    rows, blocks = len(geometry.q_blocks), len(geometry.kv_blocks)
    indices, counts = helpers.random_lists((1, 2), rows, blocks)
    if expanded == "counts":
        counts = torch.full((1, 1, 1), 2, dtype=torch.int32).expand(1, 2, rows)
        indices = torch.rand(1, 2, rows, blocks).argsort(-1).int()
    else:
        indices = torch.arange(blocks).int().expand(1, 2, rows, blocks)
    mask = oracle.list_mask(indices, counts, geometry.q_blocks, geometry.kv_blocks)

    def op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cs.ops.block_sparse_attention(q, k, v, indices, counts, **geometry.arguments())

    tensors = geometry.tensors(1, 2, 2, head_dim=16)
    helpers.assert_matches_oracle(op, *tensors, mask, rounded=True)


def test_nan_in_a_query_is_handed_on() -> None:
    q, k, v = TEXT.tensors(1, 1, 1, head_dim=16)
    q[0, 0, 7] = float("nan")
    lists = helpers.full_lists(len(TEXT.q_blocks), len(TEXT.kv_blocks))
    out, lse = cs.ops.block_sparse_attention(q, k, v, *lists, **TEXT.arguments())
    assert bool(lse.isnan()[0, 0, 7])
    assert bool(out[0, 0, 7].isnan().all())
    assert int(out.isnan().sum()) == 16


def test_the_same_call_gives_the_same_bits() -> None:
    leaves = [each.requires_grad_() for each in TEXT.tensors(1, 2, 1, head_dim=16)]
    lists = TEXT.lists(1, 2)

    def gradients() -> tuple[Tensor, ...]:
        out, _ = cs.ops.block_sparse_attention(*leaves, *lists, **TEXT.arguments())
        return torch.autograd.grad(out.square().sum(), leaves)

    assert all(map(torch.equal, gradients(), gradients()))


def test_nothing_is_launched_for_nothing(launched: list[str]) -> None:
    q = torch.randn(0, 2, 24, 16)
    lists = helpers.full_lists(3, 3)
    geometry = {"grid": (24,), "q_tile": (8,), "kv_tile": (8,)}
    out, lse = cs.ops.block_sparse_attention(q, q, q, *lists, **geometry)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 24)
