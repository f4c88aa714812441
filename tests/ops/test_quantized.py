"""The quantised kernel op against its emulation, and what callers and compilers see of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import pytest
import quantized
import torch
from helpers import Geometry
from quantized import ODD
from quantized import ONE_AXIS
from quantized import assert_emulates
from test_block_sparse import LAYOUTS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse.errors import ForwardOnlyError
from compiled_sparse.ops import cpu

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP = torch.ops.compiled_sparse.quantized_block_sparse_attention.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VALUES = ["float8", "float16"]
GEOMETRIES = {
    "1d": ONE_AXIS,
    "2d": Geometry((7, 9), (2, 5), (3, 2), text_after=4),
    "2d one tile": Geometry((3, 4), (3, 4), (5, 6), text_before=1),
    "3d": ODD,
    "published": Geometry((333,), (128,), (64,), text_after=20),
}
LARGE_BLOCKS = Geometry((333,), (64,), (128,))


def check(
    geometry: Geometry,
    tensors: tuple[Tensor, ...],
    lists: tuple[Tensor, Tensor],
    **keywords: Any,
) -> None:
    actual = quantized.op(geometry, tensors, lists, **keywords)
    assert actual[0].transpose(1, 2).is_contiguous()
    assert_emulates(actual, quantized.reference(geometry, tensors, lists, **keywords), tensors[2])


@pytest.fixture(params=["native", "portable"])
def cpu_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on each of the CPU's kernels."""
    name: str = request.param
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, name)
    return name


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_ragged_lists_match_the_emulation(
    geometry: Geometry, dtype: torch.dtype, values: str, cpu_kernel: str
) -> None:
    tensors = geometry.tensors(head_dim=64, dtype=dtype)
    check(geometry, tensors, geometry.lists(2, 3), values=values)


@pytest.mark.parametrize("values", VALUES)
def test_blocks_of_more_keys_than_a_native_chunk(
    values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, lists = LARGE_BLOCKS.tensors(head_dim=64), LARGE_BLOCKS.lists(2, 3)
    wanted, _ = quantized.reference(LARGE_BLOCKS, tensors, lists, values=values)
    exact = cs.ops.block_sparse_attention(*tensors, *lists, **LARGE_BLOCKS.arguments())[0]
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "native")
    out, _ = quantized.op(LARGE_BLOCKS, tensors, lists, values=values)
    # Rounded beside another maximum, weights differ from the emulation, and are as good.
    assert float((out - exact).norm()) <= 1.1 * float((wanted - exact).norm())
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "portable")
    check(LARGE_BLOCKS, tensors, lists, values=values)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_of_grouped_heads_match_the_emulation(
    dtype: torch.dtype, values: str, cpu_kernel: str
) -> None:
    tensors = ODD.tensors(heads=4, kv_heads=2, head_dim=128, dtype=dtype)
    tensors, shown = quantized.hide(tensors)
    check(ODD, tensors, ODD.lists(2, 4), key_mask=shown, values=values)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_lists_broadcast_over_batch_and_heads(batch: int, heads: int) -> None:
    check(ODD, ODD.tensors(head_dim=64), ODD.lists(batch, heads), values="float8")


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1.0])
def test_any_scale_matches_the_emulation(scale: float, cpu_kernel: str) -> None:
    check(ODD, ODD.tensors(head_dim=64), ODD.lists(2, 3), scale=scale, values="float8")


@pytest.mark.parametrize("rearrange", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_change_the_result(rearrange: Callable[[Tensor], Tensor]) -> None:
    tensors = tuple(rearrange(each) for each in ODD.tensors(head_dim=64))
    lists = ODD.lists(2, 3)
    packed = tuple(each.contiguous() for each in tensors)
    for one, other in zip(
        quantized.op(ODD, tensors, lists), quantized.op(ODD, packed, lists), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_auto_is_float8_on_the_cpu() -> None:
    tensors, lists = ODD.tensors(head_dim=64), ODD.lists(2, 3)
    results = [quantized.op(ODD, tensors, lists, values=v)[0] for v in ("auto", *VALUES)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_row_without_visible_keys_is_zero(cpu_kernel: str) -> None:
    tensors, lists = ODD.tensors(head_dim=64), ODD.lists(2, 3)
    hidden = torch.zeros(2, tensors[1].shape[2], dtype=torch.bool)
    out, lse = quantized.op(ODD, tensors, lists, key_mask=hidden)
    assert not out.any()
    assert bool((lse == float("-inf")).all())


def test_values_of_zero_give_zero() -> None:
    q, k, v = ODD.tensors(head_dim=64)
    lists = helpers.full_lists(len(ODD.q_blocks), len(ODD.kv_blocks))
    for values in VALUES:
        out, lse = quantized.op(ODD, (q, k, v * 0), lists, values=values)
        assert not out.any()
        assert bool(lse.isfinite().all())


@pytest.mark.parametrize("factor", [1e-20, 1e20, 3e37])
@pytest.mark.parametrize("values", VALUES)
def test_values_of_any_size_neither_overflow_nor_vanish(
    values: str, factor: float, cpu_kernel: str
) -> None:
    q, k, v = ODD.tensors(head_dim=64)
    v = v.clamp(-4, 4)
    lists = ODD.lists(2, 3)
    out, _ = quantized.op(ODD, (q, k, v * factor), lists, values=values)
    expected, _ = quantized.op(ODD, (q, k, v), lists, values=values)
    torch.testing.assert_close(out / factor, expected, rtol=1e-2, atol=0.05)


def test_nan_in_a_query_is_handed_on_to_its_block(cpu_kernel: str) -> None:
    q, k, v = ODD.tensors(1, 1, head_dim=64)
    q[0, 0, 7, 3] = float("nan")
    lists = helpers.full_lists(len(ODD.q_blocks), len(ODD.kv_blocks))
    out, lse = quantized.op(ODD, (q, k, v), lists)
    (block,) = [block for block in ODD.q_blocks if 7 in block]
    assert bool(out[0, 0, block].isnan().all())
    assert bool(lse[0, 0, 7].isnan())
    assert int(out.isnan().all(-1).sum()) == len(block)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)], ids=["no batch", "no heads"])
def test_nothing_gives_nothing(shape: tuple[int, int], cpu_kernel: str) -> None:
    q, kv = torch.zeros(*shape, 124, 64), torch.zeros(shape[0], 2, 124, 64)
    lists = helpers.full_lists(len(ODD.q_blocks), len(ODD.kv_blocks))
    out, lse = quantized.op(ODD, (q, kv, kv), lists)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]


def arguments(
    rearrange: Callable[[Tensor], Tensor], dtype: torch.dtype, masked: bool
) -> tuple[Any, ...]:
    """Positional arguments of the registered op."""
    tensors = tuple(map(rearrange, ODD.tensors(heads=4, kv_heads=2, head_dim=64, dtype=dtype)))
    mask = quantized.hide(tensors)[1] if masked else None
    return (*tensors, *ODD.lists(2, 4), mask, *ODD.positional(), None, "auto")


@pytest.mark.parametrize(
    ("dtype", "layout", "masked"),
    [
        (torch.float32, "last stride 2", True),
        (torch.bfloat16, "BLHD memory", False),
        (torch.float16, "L and D swapped", True),
    ],
    ids=str,
)
def test_opcheck_accepts_the_op(dtype: torch.dtype, layout: str, masked: bool) -> None:
    torch.library.opcheck(OP, arguments(LAYOUTS[layout], dtype, masked))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fake_has_the_real_strides(layout: str) -> None:
    real_arguments = arguments(LAYOUTS[layout], torch.bfloat16, True)
    real = OP(*real_arguments)
    with FakeTensorMode() as mode:
        fake = OP(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_wanting_a_gradient_is_an_error_at_the_forward(name: str) -> None:
    tensors = dict(zip(("q", "k", "v"), ODD.tensors(head_dim=64), strict=True))
    tensors[name].requires_grad_()
    lists = ODD.lists(2, 3)
    with pytest.raises(ForwardOnlyError, match="cannot be differentiated"):
        quantized.op(ODD, tuple(tensors.values()), lists)
    expected = quantized.op(ODD, tuple(t.detach() for t in tensors.values()), lists)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            results = quantized.op(ODD, tuple(tensors.values()), lists)
        assert all(map(torch.equal, results, expected))


def test_another_grid_compiles_once_more_and_then_never(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q: Tensor, lists: tuple[Tensor, Tensor], t: int, h: int, w: int) -> Tensor:
        geometry = {"grid": (t, h, w), "q_tile": (2, 4, 2), "kv_tile": (2, 2, 2)}
        return cs.ops.quantized_block_sparse_attention(q, q, q, *lists, **geometry)[0] + 1

    for grid in ((5, 7, 3), (6, 9, 4), (7, 5, 11)):
        geometry = Geometry(grid, (2, 4, 2), (2, 2, 2))
        q = geometry.tensors(head_dim=64)[0].requires_grad_()
        lists = geometry.lists(2, 3)
        with torch.no_grad():
            result = attend(q, lists, *grid)
            assert torch.equal(result, quantized.op(geometry, (q, q, q), lists)[0] + 1)
    assert counter.frame_count == 2


def test_a_compiled_call_that_wants_a_gradient_says_so(fresh_compiler: None) -> None:
    q, k, v = ODD.tensors(head_dim=64)
    attend = torch.compile(quantized.op, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be differentiated"):
        attend(ODD, (q.requires_grad_(), k, v), ODD.lists(2, 3))
