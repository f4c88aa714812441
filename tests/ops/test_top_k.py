"""The k best blocks of every row against their definition by loops, whatever the scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from messages import Case
from messages import assert_wording
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse.ops import top_k

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP = torch.ops.compiled_sparse.top_k_blocks.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COLUMNS = 37


def definition(scores: Tensor, k: int) -> Tensor:
    """Repeatedly take the first of the highest left; NaN is lower than -inf."""
    rows = []
    for row in scores.double().flatten(0, 2).tolist():
        left = {place: value for place, value in enumerate(row) if not math.isnan(value)}
        missing = [place for place, value in enumerate(row) if math.isnan(value)]
        taken = []
        while len(taken) < k:
            if left:
                top = max(left.values())
                best = min(place for place, value in left.items() if value == top)
                del left[best]
            else:
                best = missing.pop(0)
            taken.append(best)
        rows.append(sorted(taken))
    return torch.tensor(rows).view(*scores.shape[:-1], k)


def strange(dtype: torch.dtype, columns: int = COLUMNS) -> Tensor:
    """Rows of random scores, ties, equal scores, both zeros, infinities and NaN."""
    nan, inf = float("nan"), float("inf")
    scores = torch.randn(2, 1, 11, columns)
    scores[:, :, 1] = 3.0
    scores[:, :, 2] = torch.randint(-2, 2, (2, 1, columns)).float()
    scores[:, :, 3] = torch.where(torch.rand(columns) < 0.5, 0.0, -0.0)
    scores[:, :, 4] = -inf
    scores[:, :, 5, ::2] = inf
    scores[:, :, 6, ::3] = nan
    scores[:, :, 7] = nan
    scores[:, :, 8] = torch.tensor([nan, -inf, inf, 1.0, -nan]).repeat(columns)[:columns]
    scores[:, :, 9] *= torch.finfo(dtype).smallest_normal / 4
    scores[:, :, 10, 1:] = -inf
    return scores.to(dtype)


def assert_lists(scores: Tensor, k: int) -> None:
    indices, counts = cs.ops.top_k_blocks(scores, k)
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.is_contiguous()
    assert counts.is_contiguous()
    k = min(k, scores.shape[-1])
    assert torch.equal(indices.long(), definition(scores, k))
    assert torch.equal(counts, torch.full(scores.shape[:-1], k, dtype=torch.int32))


@pytest.mark.parametrize("k", [1, 2, 5, 18, COLUMNS - 1, COLUMNS, COLUMNS + 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_highest_are_listed_whatever_the_scores(dtype: torch.dtype, k: int) -> None:
    assert_lists(strange(dtype), k)


def test_one_key_block_is_listed() -> None:
    assert_lists(torch.full((1, 2, 3, 1), float("nan")), 1)


def test_of_ties_at_the_boundary_the_first_are_taken() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0, 0.0])[None, None, None]
    indices, _ = cs.ops.top_k_blocks(scores, 5)
    assert indices.flatten().tolist() == [0, 1, 2, 3, 6]
    indices, _ = cs.ops.top_k_blocks(torch.zeros(1, 1, 2, 9), 4)
    assert indices.tolist() == [[[[0, 1, 2, 3]] * 2]]


@pytest.mark.parametrize("distinct", [2, 50, 10_000], ids=str)
def test_many_columns(distinct: int) -> None:
    scores = torch.randint(0, distinct, (1, 2, 5, 1440)).float()
    assert_lists(scores, 144)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_are_taken_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k, "_CACHED_SCORES", 5 * COLUMNS)
    assert_lists(strange(dtype), 7)


def test_more_columns_than_16_bits_count() -> None:
    scores = torch.randint(0, 9, (1, 1, 2, 70_000)).bfloat16()
    scores[..., -1] = 20.0
    assert_lists(scores, 3)


def test_strides_do_not_matter() -> None:
    scores = strange(torch.float32)
    strided = scores.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert_lists(strided, 7)
    assert_lists(scores[:1].expand(3, 2, -1, -1)[..., 1:], 7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("k", "count"), [(-4, 1), (0, 1), (1, 1), (5, 5), (9, 9), (12, 9)])
def test_k_may_be_a_tensor(k: int, count: int, dtype: torch.dtype) -> None:
    scores = strange(torch.float32)
    indices, counts = cs.ops.top_k_blocks(scores, torch.tensor(k, dtype=dtype), max_k=9)
    assert indices.shape[-1] == 9
    assert torch.equal(indices[..., :count].long(), definition(scores, count))
    assert bool((indices[..., count:] == 0).all())
    assert bool((counts == count).all())


def test_lists_are_never_wider_than_the_keys() -> None:
    indices, counts = cs.ops.top_k_blocks(torch.randn(1, 1, 2, 5), torch.tensor(8), max_k=9)
    assert indices.tolist() == [[[[0, 1, 2, 3, 4]] * 2]]
    assert counts.tolist() == [[[5, 5]]]


def test_no_rows_give_no_lists() -> None:
    indices, counts = cs.ops.top_k_blocks(torch.zeros(0, 3, 4, 5), 2)
    assert indices.shape == (0, 3, 4, 2)
    assert counts.shape == (0, 3, 4)


def test_the_lists_carry_no_gradient_and_fit_the_kernel_op() -> None:
    q, k, v = (torch.randn(1, 2, 12, 4, requires_grad=True) for _ in range(3))
    place: dict[str, Any] = {"grid": (2, 3, 2), "tile": (1, 3, 1)}
    scores = cs.ops.tile_mean(q, **place) @ cs.ops.tile_mean(k, **place).mT
    lists = cs.ops.top_k_blocks(scores, 4)
    assert not any(each.requires_grad for each in lists)
    out, _ = cs.ops.block_sparse_attention(
        q, k, v, *lists, grid=place["grid"], q_tile=place["tile"], kv_tile=place["tile"]
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected)
    out.sum().backward()


@pytest.mark.parametrize("k", [None, torch.tensor(3)], ids=["integer", "tensor"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_accepts_the_op(k: Tensor | None, grad: bool) -> None:
    torch.library.opcheck(OP, (strange(torch.float32).requires_grad_(grad), 4, k))


@pytest.mark.parametrize("k", [3, COLUMNS + 1])
def test_the_fake_has_the_real_strides(k: int) -> None:
    scores = strange(torch.float32).mT.contiguous().mT
    real = cs.ops.top_k_blocks(scores, k)
    with FakeTensorMode() as mode:
        fake = cs.ops.top_k_blocks(mode.from_tensor(scores), k)
    for each, other in zip(real, fake, strict=True):
        assert (each.shape, each.stride(), each.dtype) == (
            *(other.shape, other.stride()),
            other.dtype,
        )


def test_another_k_as_a_tensor_compiles_nothing(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def select(scores: Tensor, sparsity: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.ceil((1 - sparsity) * scores.shape[-1]).to(torch.int32)
        return cs.ops.top_k_blocks(scores, kept, max_k=20)

    scores = torch.randn(1, 2, 5, 20)
    for sparsity, count in ((0.75, 5), (0.5, 10), (0.0, 20)):
        indices, counts = select(scores, torch.tensor(sparsity))
        assert counts.unique().tolist() == [count]
        assert torch.equal(indices[..., :count].long(), definition(scores, count))
    assert counter.frame_count == 1


SCORES = torch.zeros(1, 2, 3, 4)
CASES = {
    "rank": Case(
        errors.ShapeError,
        "scores has the wrong rank",
        "(2, 3, 4)",
        "[batch, heads, query blocks, key blocks]",
        "heads come before blocks",
        lambda: cs.ops.top_k_blocks(SCORES[0], 2),
    ),
    "dtype": Case(
        errors.DtypeError,
        "scores has an unsupported dtype",
        "torch.int64",
        "torch.float32, torch.bfloat16",
        "cast scores",
        lambda: cs.ops.top_k_blocks(SCORES.long(), 2),
    ),
    "none": Case(
        errors.ShapeError,
        "there is nothing to list",
        "k or max_k 0, scores of shape (1, 2, 3, 4)",
        "at least 1",
        "max(1, k)",
        lambda: cs.ops.top_k_blocks(SCORES, 0),
    ),
    "no keys": Case(
        errors.ShapeError,
        "there is nothing to list",
        "(1, 2, 3, 0)",
        "at least one key block",
        "max(1, k)",
        lambda: cs.ops.top_k_blocks(SCORES[..., :0], 1),
    ),
    "no width": Case(
        errors.ShapeError,
        "width of the lists is not given exactly once",
        "k as a tensor, max_k=None",
        "k as a tensor with max_k",
        "pass max_k=",
        lambda: cs.ops.top_k_blocks(SCORES, torch.tensor(1)),
    ),
    "two widths": Case(
        errors.ShapeError,
        "width of the lists is not given exactly once",
        "k 2, max_k=3",
        "an integer k alone",
        "leave max_k out",
        lambda: cs.ops.top_k_blocks(SCORES, 2, max_k=3),
    ),
    "axes": Case(
        errors.ShapeError,
        "k has axes",
        "(1,)",
        "one k for all rows",
        "k.reshape(())",
        lambda: cs.ops.top_k_blocks(SCORES, torch.tensor([1]), max_k=3),
    ),
    "k dtype": Case(
        errors.DtypeError,
        "k is not an integer tensor",
        "torch.float32",
        "torch.int32 or torch.int64",
        ".to(torch.int32)",
        lambda: cs.ops.top_k_blocks(SCORES, torch.tensor(1.0), max_k=3),
    ),
    "devices": Case(
        errors.DeviceError,
        "k and scores are on different devices",
        "k on meta, scores on cpu",
        "one device",
        "move k to cpu",
        lambda: cs.ops.top_k_blocks(SCORES, torch.tensor(1, device="meta"), max_k=3),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errors_say_what_to_do(case: Case) -> None:
    assert_wording(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_kernel_agrees(dtype: torch.dtype, gpu_kernels_on_cpu: None) -> None:
    assert_lists(strange(dtype)[1:], 6)


@pytest.mark.parametrize("k", [1, COLUMNS])
def test_the_gpu_kernel_agrees_at_the_ends(k: int, gpu_kernels_on_cpu: None) -> None:
    assert_lists(strange(torch.float16)[1:, :, 5:], k)


@pytest.mark.parametrize("k", [0, 3, 9])
def test_the_gpu_kernel_reads_k(k: int, gpu_kernels_on_cpu: None) -> None:
    scores = torch.randint(0, 9, (1, 1, 2, 11)).half()
    indices, counts = cs.ops.top_k_blocks(scores, torch.tensor(k), max_k=5)
    count = min(max(k, 1), 5)
    assert torch.equal(indices[..., :count].long(), definition(scores, count))
    assert bool((indices[..., count:] == 0).all())
    assert counts.tolist() == [[[count] * 2]]


def test_the_gpu_kernel_takes_a_long_row_in_parts(
    monkeypatch: pytest.MonkeyPatch, gpu_kernels_on_cpu: None
) -> None:
    from compiled_sparse.kernels import top_k as kernels

    monkeypatch.setattr(kernels, "_MAX_SIZE", 16)
    monkeypatch.setattr(kernels, "_STEP_PER_WARP", 8)
    assert_lists(strange(torch.float16)[1:, :, [0, 1, 2, 6]], 19)
