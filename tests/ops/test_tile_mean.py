"""Means of blocks against their definition in float64: values, gradients, what compilers see."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from messages import Case
from messages import assert_wording
from test_block_sparse import LAYOUTS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse import errors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP = torch.ops.compiled_sparse.tile_mean.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

Place = tuple[tuple[int, ...], tuple[int, ...], int, int]
PLACES: dict[str, Place] = {
    "1d": ((29,), (4,), 3, 7),
    "1d long tile": ((31,), (64,), 0, 0),
    "2d": ((7, 9), (2, 5), 0, 4),
    "3d small": ((5, 7, 3), (4, 4, 4), 0, 0),
    "3d odd": ((9, 10, 7), (4, 4, 4), 0, 0),
    "3d text": ((5, 7, 3), (4, 4, 4), 65, 130),
    "3d divisible": ((4, 8, 4), (4, 4, 4), 0, 0),
    "3d tiles of one": ((2, 3, 2), (1, 1, 1), 1, 1),
}


def length(place: Place) -> int:
    grid, _, before, after = place
    return math.prod(grid) + before + after


def tokens(place: Place, dtype: torch.dtype = torch.float32, head_dim: int = 5) -> Tensor:
    return torch.randn(2, 3, length(place), head_dim).to(dtype)


def means(x: Tensor, place: Place) -> Tensor:
    grid, tile, before, after = place
    return cs.ops.tile_mean(x, grid=grid, tile=tile, text_before=before, text_after=after)


def definition(x: Tensor, place: Place) -> Tensor:
    """The mean of each block's tokens in float64, block by block and token by token."""
    rows = []
    for block in oracle.blocks(*place):
        total = torch.zeros_like(x[:, :, 0], dtype=torch.float64)
        for token in block:
            total = total + x[:, :, token].double()
        rows.append(total / len(block))
    return torch.stack(rows, dim=2)


def assert_rounded_once(actual: Tensor, exact: Tensor, x: Tensor) -> None:
    """Check for one rounding to the dtype after arithmetic in float32, or in float64."""
    arithmetic = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    budget = torch.finfo(x.dtype).eps / 2 * exact.abs() + 8 * arithmetic * x.double().abs().max()
    assert actual.dtype == x.dtype
    assert bool(((actual.double() - exact).abs() <= budget).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_means_are_those_of_the_true_tokens(place: Place, dtype: torch.dtype) -> None:
    x = tokens(place, dtype)
    assert_rounded_once(means(x, place), definition(x, place), x)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rearrange", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(rearrange: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    place = PLACES["3d text"]
    x = rearrange(tokens(place, dtype))
    result = means(x, place)
    assert_rounded_once(result, definition(x, place), x)
    assert result.is_contiguous()


def test_large_blocks_do_not_lose_precision() -> None:
    place: Place = ((4096,), (2048,), 0, 0)
    x = (1.0 + torch.rand(1, 1, 4096, 3)).bfloat16()
    assert_rounded_once(means(x, place), definition(x, place), x)


@pytest.mark.parametrize("place", [PLACES["2d"], ((3, 2, 3), (2, 2, 2), 1, 9)], ids=str)
def test_first_and_second_derivatives_are_right(place: Place) -> None:
    x = tokens(place, torch.float64, 2)[:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: means(x, place), x)
    assert torch.autograd.gradgradcheck(lambda x: means(x, place).square(), x)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_every_token_gets_its_share_of_the_gradient(place: Place, dtype: torch.dtype) -> None:
    x = tokens(place, dtype).requires_grad_()
    result = means(x, place)
    weight = torch.randn(result.shape).to(dtype)
    (grad,) = torch.autograd.grad(result, x, weight)
    expected = torch.empty_like(x)
    for number, block in enumerate(oracle.blocks(*place)):
        for token in block:
            expected[:, :, token] = (weight[:, :, number].float() / len(block)).to(dtype)
    assert torch.equal(grad, expected)
    assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_nothing_has_no_means(shape: tuple[int, int]) -> None:
    x = torch.zeros(*shape, 105, 4, requires_grad=True)
    result = cs.ops.tile_mean(x, grid=(5, 7, 3), tile=(2, 4, 2))
    assert result.shape == (*shape, 12, 4)
    assert torch.autograd.grad(result.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_accepts_the_op(grad: bool, dtype: torch.dtype) -> None:
    grid, tile, before, after = PLACES["3d text"]
    x = LAYOUTS["BLHD memory"](tokens(PLACES["3d text"], dtype)).requires_grad_(grad)
    torch.library.opcheck(OP, (x, list(grid), list(tile), before, after))


@pytest.mark.parametrize("rearrange", LAYOUTS.values(), ids=LAYOUTS)
def test_the_fake_has_the_real_strides(rearrange: Callable[[Tensor], Tensor]) -> None:
    place = PLACES["3d text"]
    x = rearrange(tokens(place))
    real = means(x, place)
    with FakeTensorMode() as mode:
        fake = means(mode.from_tensor(x), place)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_another_grid_compiles_once_more_and_then_never(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def pool(x: Tensor, t: int, h: int, w: int) -> Tensor:
        return cs.ops.tile_mean(x, grid=(t, h, w), tile=(2, 4, 2), text_after=3)

    for grid in ((5, 7, 3), (6, 9, 4), (7, 5, 11)):
        place: Place = (grid, (2, 4, 2), 0, 3)
        x = tokens(place).requires_grad_()
        result = pool(x, *grid)
        assert torch.equal(result, means(x, place))
        weight = torch.randn(result.shape)
        actual, expected = (torch.autograd.grad(r, x, weight) for r in (result, means(x, place)))
        assert torch.equal(actual[0], expected[0])
    assert counter.frame_count == 2


X = torch.zeros(1, 2, 105, 4)
CASES = {
    "rank": Case(
        errors.ShapeError,
        "x has the wrong rank",
        "(2, 105, 4)",
        "[batch, heads, length, head_dim]",
        "heads come before length",
        lambda: cs.ops.tile_mean(X[0], grid=(5, 7, 3), tile=(2, 2, 2)),
    ),
    "dtype": Case(
        errors.DtypeError,
        "x has an unsupported dtype",
        "torch.int64",
        "torch.float32, torch.bfloat16",
        "cast x",
        lambda: cs.ops.tile_mean(X.long(), grid=(5, 7, 3), tile=(2, 2, 2)),
    ),
    "length": Case(
        errors.LayoutError,
        "do not add up to the length of x",
        "x of length 105, grid (5, 7, 2), text 0 before and 1 after",
        "length 71",
        "after patching",
        lambda: cs.ops.tile_mean(X, grid=(5, 7, 2), tile=(2, 2, 2), text_after=1),
    ),
    "axes": Case(
        errors.LayoutError,
        "different numbers of axes",
        "tile (2, 2)",
        "one tile side per grid axis",
        "3 sides",
        lambda: cs.ops.tile_mean(X, grid=(5, 7, 3), tile=(2, 2)),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errors_say_what_to_do(case: Case) -> None:
    assert_wording(case)


@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        (((5, 3, 2), (4, 2, 2), 5, 17), torch.bfloat16),
        (((5, 6), (2, 4), 0, 0), torch.float16),
        (((7,), (3,), 4, 0), torch.float32),
        (((3, 3), (2, 2), 0, 1), torch.float64),
    ],
    ids=str,
)
def test_the_gpu_kernel_agrees(place: Place, dtype: torch.dtype, gpu_kernels_on_cpu: None) -> None:
    x = LAYOUTS["BLHD memory"](tokens(place, dtype)[:1, :2])
    assert_rounded_once(means(x, place), definition(x, place), x)


def test_the_gpu_kernel_takes_a_large_block_in_parts(gpu_kernels_on_cpu: None) -> None:
    place: Place = ((5, 5), (5, 5), 0, 0)
    x = LAYOUTS["last stride 2"](torch.randn(2, 1, 25, 600))
    assert_rounded_once(means(x, place), definition(x, place), x)


def test_the_gpu_kernel_is_not_run_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPILED_SPARSE_CPU_KERNEL", "interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(errors.DeviceError, match="without Triton's interpreter"):
        cs.ops.tile_mean(X, grid=(5, 7, 3), tile=(2, 2, 2))
