"""The kernel op as the compiler sees it: schema, fake, strides, autograd, recompiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import ODD
from helpers import Geometry
from test_block_sparse import LAYOUTS
from test_block_sparse import padding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse.errors import DeviceError

FORWARD = torch.ops.compiled_sparse.block_sparse_attention.default
BACKWARD = torch.ops.compiled_sparse.block_sparse_attention_backward.default
Arguments = tuple[object, ...]


def forward_arguments(
    rearrange: Callable[[Tensor], Tensor], dtype: torch.dtype, masked: bool, grad: bool = False
) -> Arguments:
    """Arguments of the registered op with grouped heads, batch 2 and odd lengths."""
    tensors = [
        rearrange(each.repeat(1, heads, 1, 1)).detach()
        for each, heads in zip(ODD.tensors(heads=2, dtype=dtype), (2, 1, 1), strict=True)
    ]
    key_mask = padding(2, tensors[1].shape[2]) if masked else None
    tensors = [each.requires_grad_(grad) for each in tensors]
    return (*tensors, *ODD.lists(2, 1), key_mask, *ODD.positional(), None)


def backward_arguments(
    rearrange: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    masked: bool,
    with_lse: bool,
    grad: bool = False,
) -> Arguments:
    """Arguments of the registered backward op that belong together."""
    forward = forward_arguments(rearrange, dtype, masked)
    out, lse = FORWARD(*forward)
    grad_out = rearrange(torch.randn(out.shape).to(dtype)).detach().requires_grad_(grad)
    grad_lse = torch.randn(lse.shape) if with_lse else None
    return (grad_out, grad_lse, *forward[:3], out, lse, *forward[3:])


# One case for each pair of choices that could interact; the full product runs as a slow test.
PAIRS = [
    (torch.float32, "BLHD memory", False),
    (torch.bfloat16, "BLHD memory", True),
    (torch.float32, "last stride 2", True),
    (torch.bfloat16, "a slice", False),
]
PRODUCT = [(d, s, m) for d in (torch.float32, torch.bfloat16) for s in LAYOUTS for m in (0, 1)]
INTERNAL = ("test_schema", "test_autograd_registration", "test_faketensor")


def identity(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dtype", "layout", "masked"), PAIRS, ids=str)
def test_opcheck_accepts_the_forward(
    dtype: torch.dtype, layout: str, masked: bool, grad: bool
) -> None:
    torch.library.opcheck(FORWARD, forward_arguments(LAYOUTS[layout], dtype, masked, grad))


@pytest.mark.parametrize("with_lse", [False, True], ids=["no grad_lse", "grad_lse"])
@pytest.mark.parametrize(("dtype", "layout", "masked"), PAIRS[:2], ids=str)
def test_opcheck_accepts_the_backward(
    dtype: torch.dtype, layout: str, masked: bool, with_lse: bool
) -> None:
    torch.library.opcheck(BACKWARD, backward_arguments(LAYOUTS[layout], dtype, masked, with_lse))


def test_opcheck_accepts_a_backward_that_is_itself_tracked() -> None:
    arguments = backward_arguments(identity, torch.float32, True, True, grad=True)
    torch.library.opcheck(BACKWARD, arguments, test_utils=INTERNAL)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dtype", "layout", "masked"), PRODUCT, ids=str)
def test_opcheck_accepts_every_combination(
    dtype: torch.dtype, layout: str, masked: bool, grad: bool
) -> None:
    torch.library.opcheck(FORWARD, forward_arguments(LAYOUTS[layout], dtype, masked, grad))
    torch.library.opcheck(BACKWARD, backward_arguments(LAYOUTS[layout], dtype, masked, grad))


def fake_results(op: Callable[..., tuple[Tensor, ...]], arguments: Arguments) -> list[Tensor]:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        return list(op(*fakes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_outputs_and_gradients_have_the_real_strides(layout: str, dtype: torch.dtype) -> None:
    forward = forward_arguments(LAYOUTS[layout], dtype, True)
    backward = backward_arguments(LAYOUTS[layout], dtype, True, True)
    for op, arguments in ((FORWARD, forward), (BACKWARD, backward)):
        real, fake = op(*arguments), fake_results(op, arguments)
        for each, other in zip(real, fake, strict=True):
            assert (each.shape, each.stride(), each.dtype, each.device) == (
                *(other.shape, other.stride(), other.dtype),
                other.device,
            )
            assert each.storage_offset() == other.storage_offset() == 0


def test_the_output_flattens_to_tokens_without_a_copy() -> None:
    out, lse = FORWARD(*forward_arguments(identity, torch.float32, False))
    tokens = out.transpose(1, 2).flatten(2)
    assert tokens.data_ptr() == out.data_ptr()
    assert tokens.is_contiguous()
    assert lse.is_contiguous()


def test_inputs_are_neither_changed_nor_returned() -> None:
    arguments = forward_arguments(identity, torch.float32, True)
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    outputs = FORWARD(*arguments)
    storages = {o.untyped_storage().data_ptr() for o in outputs}
    for now, then in zip(arguments, before, strict=True):
        if isinstance(now, Tensor):
            assert torch.equal(now, then)
            assert now.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 5])
def test_a_tensor_on_another_device_is_refused(position: int) -> None:
    arguments = list(forward_arguments(identity, torch.float32, True))
    arguments[position] = arguments[position].to("meta")
    with pytest.raises(DeviceError, match="different devices"):
        FORWARD(*arguments)


def test_both_ops_have_an_implementation_for_gpus() -> None:
    for op in (FORWARD, BACKWARD):
        assert op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)


def test_a_changed_default_device_does_not_leak_into_the_op() -> None:
    geometry = Geometry((11, 4), (3, 3), (2, 4), text_after=3)
    tensors, lists = geometry.tensors(), geometry.lists()
    with torch.device("meta"):
        out, _ = cs.ops.block_sparse_attention(*tensors, *lists, **geometry.arguments())
    again, _ = cs.ops.block_sparse_attention(*tensors, *lists, **geometry.arguments())
    assert torch.equal(out, again)


def test_plans_made_in_inference_mode_serve_training() -> None:
    geometry = Geometry((12, 4), (3, 3), (2, 4), text_after=3)
    tensors, lists = geometry.tensors(), geometry.lists()
    with torch.inference_mode():
        cs.ops.block_sparse_attention(*tensors, *lists, **geometry.arguments())
    leaves = [each.requires_grad_() for each in tensors]
    out, _ = cs.ops.block_sparse_attention(*leaves, *lists, **geometry.arguments())
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


TILE = 4


def run_1d(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    out, lse = cs.ops.block_sparse_attention(
        *(q, k, v, indices, counts),
        grid=(q.shape[2],),
        q_tile=(TILE,),
        kv_tile=(TILE,),
    )
    return out * torch.where(lse.isinf(), 0.0, lse)[..., None]


def inputs_1d(length: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    geometry = Geometry((length,), (TILE,), (TILE,))
    tensors = [each.requires_grad_() for each in geometry.tensors()]
    return tensors, geometry.lists()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.usefixtures("fresh_compiler")
def test_four_lengths_take_at_most_two_compilations(training: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_1d, fullgraph=True, backend=counter)
    for length in (21, 30, 47, 64):
        tensors, lists = inputs_1d(length)
        tensors = [each.requires_grad_(training) for each in tensors]
        out, expected = compiled(*tensors, *lists), run_1d(*tensors, *lists)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        if training:
            weight = torch.randn(out.shape)
            grads = torch.autograd.grad(out, tensors, weight)
            expected_grads = torch.autograd.grad(expected, tensors, weight)
            assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_gives_the_eager_values_and_gradients() -> None:
    compiled = torch.compile(run_1d, fullgraph=True, dynamic=True)
    for length in (21, 30):
        tensors, lists = inputs_1d(length)
        out, expected = compiled(*tensors, *lists), run_1d(*tensors, *lists)
        torch.testing.assert_close(out, expected)
        weight = torch.randn(out.shape)
        for grad, expected_grad in zip(
            torch.autograd.grad(out, tensors, weight),
            torch.autograd.grad(expected, tensors, weight),
            strict=True,
        ):
            torch.testing.assert_close(grad, expected_grad)
