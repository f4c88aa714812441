"""The kernel op against float64 loops: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import helpers
import oracle
import pytest
import torch
from helpers import ODD
from helpers import Geometry
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.errors import DoubleBackwardError
from compiled_sparse.ops import cpu

pytestmark = pytest.mark.usefixtures("poisoned_memory", "device_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

GEOMETRIES = {
    "1d": Geometry((29,), (4,), (6,), text_before=3, text_after=7),
    "1d no text": Geometry((31,), (8,), (5,)),
    "1d more keys": Geometry((13,), (4,), (6,), text_before=2, text_after=1, key_length=30),
    "1d fewer keys": Geometry((40,), (7,), (4,), key_length=9),
    "2d": Geometry((7, 9), (2, 5), (3, 2), text_after=4),
    "2d one tile": Geometry((3, 4), (3, 4), (5, 6), text_before=1),
    "3d": ODD,
    "3d no text": Geometry((5, 7, 3), (2, 3, 2), (5, 2, 3)),
}


@pytest.fixture(
    params=["cpu", pytest.param("gpu", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=lambda name: f"{name} kernels",
)
def device_kernels(request: pytest.FixtureRequest) -> None:
    """Run every test on the CPU's kernels, and on those for GPUs under Triton's interpreter."""
    if request.param == "gpu":
        request.getfixturevalue("gpu_kernels_on_cpu")


def kernel(
    geometry: Geometry,
    lists: tuple[Tensor, Tensor],
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> helpers.Attention:
    """The op as a function of q, k and v."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cs.ops.block_sparse_attention(
            q, k, v, *lists, key_mask=key_mask, scale=scale, **geometry.arguments()
        )

    return attention


def padding(batch: int, length: int) -> Tensor:
    """A key mask with a hole, a tail, and at least one key left."""
    mask = torch.rand(batch, length) < 0.8
    mask[0, -3:] = False
    mask[:, 0] = True
    return mask


def check(
    geometry: Geometry,
    tensors: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    mask = oracle.list_mask(*lists, geometry.q_blocks, geometry.kv_blocks)
    attention = kernel(geometry, lists, key_mask, scale)
    helpers.assert_matches_oracle(
        attention,
        *tensors,
        mask,
        key_mask=key_mask,
        scale=scale,
        rounded=cpu.interprets_gpu_kernels(),
    )


def test_fresh_memory_really_is_poisoned() -> None:
    for dtype in DTYPES:
        assert bool(torch.zeros(1).new_empty(5, dtype=dtype).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_ragged_lists_match_the_oracle_on_every_grid(
    geometry: Geometry, dtype: torch.dtype
) -> None:
    check(geometry, geometry.tensors(dtype=dtype), geometry.lists(2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_padded_grouped_keys_match_the_oracle_on_every_grid(
    geometry: Geometry, dtype: torch.dtype
) -> None:
    q, k, v = geometry.tensors(heads=6, kv_heads=2, head_dim=16, dtype=dtype)
    check(geometry, (q, k, v), geometry.lists(2, 6), padding(2, k.shape[2]))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_lists_broadcast_over_batch_and_heads(batch: int, heads: int) -> None:
    check(ODD, ODD.tensors(), ODD.lists(batch, heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 32, 64, 96, 128, 136])
def test_every_head_size_matches_the_oracle(head_dim: int, dtype: torch.dtype) -> None:
    geometry = Geometry((3, 5, 3), (2, 3, 2), (2, 2, 2), text_after=3)
    tensors = geometry.tensors(batch=1, heads=1, head_dim=head_dim, dtype=dtype)
    check(geometry, tensors, geometry.lists())


def test_a_tile_larger_than_a_kernel_step_matches_the_oracle() -> None:
    geometry = Geometry((9, 11, 7), (8, 8, 6), (7, 11, 7), text_before=70)
    check(geometry, geometry.tensors(1, 1, head_dim=32), geometry.lists())


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_listing_every_block_is_dense_attention(geometry: Geometry) -> None:
    lists = helpers.full_lists(len(geometry.q_blocks), len(geometry.kv_blocks))
    leaves = [each.requires_grad_() for each in geometry.tensors(dtype=torch.float64)]
    sparse = kernel(geometry, lists)(*leaves)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(*leaves)
    weight = torch.randn(dense.shape, dtype=torch.float64)
    torch.testing.assert_close(sparse, dense)
    for grad, expected in zip(
        torch.autograd.grad(sparse, leaves, weight),
        torch.autograd.grad(dense, leaves, weight),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 12.0])
def test_the_scale_is_the_given_one(scale: float) -> None:
    check(ODD, ODD.tensors(), ODD.lists(), scale=scale)


def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    q, k, v = ODD.tensors()
    check(ODD, (q * 30, k * 30, v), ODD.lists())


def spread(tensor: Tensor) -> Tensor:
    """The same values with a last stride of 2."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "BLHD memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": spread,
    "L and D swapped": lambda x: x.mT.contiguous().mT,
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one batch for all": lambda x: x[:1].expand_as(x),
    "a slice": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, 1::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rearrange", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_change_the_result(
    rearrange: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    q, k, v = (rearrange(each) for each in ODD.tensors(dtype=dtype))
    lists = ODD.lists(2, 3)
    attention = kernel(ODD, lists)
    strided = attention(q, k, v)
    packed = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    check(ODD, (q, k, v), lists)


@pytest.mark.parametrize("rearrange", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_of_the_incoming_gradient_do_not_matter(
    rearrange: Callable[[Tensor], Tensor],
) -> None:
    inputs = [each.requires_grad_() for each in ODD.tensors()]
    out, lse = kernel(ODD, ODD.lists())(*inputs)
    weight = rearrange(torch.randn(out.shape))
    lse_weight = spread(torch.randn(lse.shape))
    lse = lse.masked_fill(lse.isinf(), 0.0)
    strided = torch.autograd.grad((out, lse), inputs, (weight, lse_weight), retain_graph=True)
    packed = (weight.contiguous(), lse_weight.contiguous())
    expected = torch.autograd.grad((out, lse), inputs, packed)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


def test_strided_lists_and_masks_are_read_as_they_are() -> None:
    q, k, v = ODD.tensors()
    indices, counts = ODD.lists(2, 3)
    mask = padding(2, k.shape[2])
    expected = kernel(ODD, (indices, counts), mask)(q, k, v)
    strided = (spread(indices), counts.mT.contiguous().mT)
    actual = kernel(ODD, strided, mask.mT.contiguous().mT)(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    expanded = (indices[:1, :1].expand(2, 3, -1, -1), counts[:1, :1].expand(2, 3, -1))
    actual = kernel(ODD, expanded, mask)(q, k, v)
    expected = kernel(ODD, (indices[:1, :1], counts[:1, :1]), mask)(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_query_without_a_key_gives_zero_minus_infinity_and_no_gradient(
    dtype: torch.dtype,
) -> None:
    q, k, v = (each.requires_grad_() for each in ODD.tensors(dtype=dtype))
    indices, counts = ODD.lists(2, 3)
    key_mask = torch.ones(2, k.shape[2], dtype=torch.bool)
    key_mask[1] = False
    out, lse = kernel(ODD, (indices, counts), key_mask)(q, k, v)
    empty = ~(
        oracle.list_mask(indices, counts, ODD.q_blocks, ODD.kv_blocks) & key_mask[:, None, None]
    )
    empty = empty.all(-1)
    assert bool(empty[0].any())
    assert not bool(empty[0].all())
    assert bool(empty[1].all())
    assert torch.equal(lse == float("-inf"), empty)
    assert bool((out[empty] == 0).all())
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((grads[0][empty] == 0).all())
    assert all(bool((grad[1] == 0).all()) for grad in grads)


def test_a_list_of_width_zero_sees_nothing() -> None:
    q, k, v = (each.requires_grad_() for each in ODD.tensors())
    rows = len(ODD.q_blocks)
    nothing = torch.zeros(1, 1, rows, 0).int(), torch.zeros(1, 1, rows).int()
    out, lse = kernel(ODD, nothing)(q, k, v)
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool((grad == 0).all()) for grad in grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_masked_keys_hold_never_matters(bad: float) -> None:
    q, k, v = ODD.tensors()
    key_mask = padding(2, k.shape[2])
    lists = ODD.lists(2, 3)
    hidden = ~key_mask[:, None, :, None]
    results = []
    for fill in (0.0, bad):
        leaves = [q, k.masked_fill(hidden, fill), v.masked_fill(hidden, fill)]
        leaves = [each.detach().requires_grad_() for each in leaves]
        out, lse = kernel(ODD, lists, key_mask)(*leaves)
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_log_sum_exp_alone_can_be_differentiated() -> None:
    mask = oracle.list_mask(*ODD.lists(), ODD.q_blocks, ODD.kv_blocks)
    gradients = []
    for attention, dtype in (
        (kernel(ODD, ODD.lists()), torch.float32),
        (lambda q, k, v: oracle.attention(q, k, v, mask), torch.float64),
        (lambda q, k, v: oracle.attention(q, k, v, mask), torch.float32),
    ):
        torch.manual_seed(1)
        leaves = [each.to(dtype).requires_grad_() for each in ODD.tensors()]
        lse = attention(*leaves)[1]
        loss = lse.masked_fill(lse.isinf(), 0.0).square().sum()
        gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for name, *triple in zip(("grad_q", "grad_k", "grad_v"), *gradients, strict=True):
        helpers.assert_error_within_budget(name, *triple)
    assert bool((gradients[0][2] == 0).all())


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("name", ["1d more keys", "2d", "3d no text"])
def test_gradcheck_of_output_and_log_sum_exp_with_grouped_heads(name: str, masked: bool) -> None:
    small = {
        "1d more keys": Geometry((5,), (2,), (3,), text_before=1, key_length=8),
        "2d": Geometry((3, 2), (2, 2), (2, 1), text_after=2),
        "3d no text": Geometry((2, 3, 2), (1, 2, 2), (2, 2, 1)),
    }
    geometry = small[name]
    leaves = geometry.tensors(batch=2, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    leaves = tuple(each.requires_grad_() for each in leaves)
    key_mask = padding(2, leaves[1].shape[2]) if masked else None
    lists = geometry.lists(2, 2)

    def finite(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel(geometry, lists, key_mask)(*inputs)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    # Interpreted, a call takes a second: random directions instead of every element.
    fast = cpu.interprets_gpu_kernels()
    assert torch.autograd.gradcheck(finite, leaves, nondet_tol=0.0, fast_mode=fast)


def test_a_second_derivative_raises() -> None:
    leaves = [each.requires_grad_() for each in ODD.tensors()]
    out, _ = kernel(ODD, ODD.lists())(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="differentiable only once"):
        torch.autograd.grad(grads[1].sum(), leaves)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_asked_gradients_are_given(needed: tuple[int, ...]) -> None:
    tensors = ODD.tensors()
    attention = kernel(ODD, ODD.lists())
    everything = [each.detach().requires_grad_() for each in tensors]
    expected = torch.autograd.grad(attention(*everything)[0].sum(), everything)
    some = [each.detach().requires_grad_(i in needed) for i, each in enumerate(tensors)]
    attention(*some)[0].sum().backward()
    for i, (leaf, grad) in enumerate(zip(some, expected, strict=True)):
        assert torch.equal(leaf.grad, grad) if i in needed else leaf.grad is None


def test_the_same_call_gives_the_same_bits() -> None:
    leaves = [each.requires_grad_() for each in ODD.tensors()]
    attention = kernel(ODD, ODD.lists())
    first, second = (torch.autograd.grad(attention(*leaves)[0].sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
