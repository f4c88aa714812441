"""Sparse-linear attention compiled, under autocast, and with a sparsity that changes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from attending import OPS
from attending import Inputs
from attending import Selections
from attending import assert_same_outcome
from attending import assert_same_sums
from attending import cast
from attending import outcome
from attending import over_blhd
from attending import relative
from attending import weights_for
from hypothesis import given
from hypothesis import strategies as st
from sla_cases import BOXES
from sla_cases import FEATURES
from sla_cases import NAMES
from sla_cases import RUNS
from sla_cases import config_of
from sla_cases import padding
from sla_cases import sla
from sla_cases import tensors
from sla_oracle import Case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_sparse as cs
from compiled_sparse.ops.plan import tile_of_token

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
FEATURE_FIRST = [
    "softmax",
    *(pytest.param(each, marks=pytest.mark.slow) for each in FEATURES if each != "softmax"),
]
LAYOUTS = pytest.mark.parametrize("case", [RUNS, BOXES], ids=["runs", "boxes"])


@LAYOUTS
def test_the_traced_op_is_one_selection_one_kernel_op_and_aten(case: Case) -> None:
    inputs = [each.detach() for each in tensors(case)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(sla(case))(*inputs)
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    called = [node.target for node in nodes if node.target is not operator.getitem]
    assert [op for op in called if op.namespace != "aten"] == [
        OPS.top_k_blocks.default,
        OPS.block_sparse_attention.default,
    ]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_FIRST)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@LAYOUTS
def test_a_compiled_call_gives_the_eager_values_strides_and_gradients(
    case: Case, masked: bool, feature_map: str, backend: str
) -> None:
    case = case._replace(key_mask=padding(case) if masked else None, feature_map=feature_map)
    inputs = tensors(case, kv_heads=1)
    compiled = torch.compile(sla(case), fullgraph=True, backend=backend)
    assert_same_outcome(compiled, sla(case), inputs, NAMES)
    with torch.no_grad():
        out = compiled(*inputs)[0]
        torch.testing.assert_close(out, sla(case)(*inputs)[0])
    assert out.stride() == sla(case)(*inputs)[0].stride()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_traced_gradients_in_low_precision_are_within_a_rounding_of_eager_ones(
    dtype: torch.dtype, backend: str
) -> None:
    inputs = tensors(RUNS, dtype=dtype)
    weights = weights_for(inputs)
    compiled = torch.compile(sla(RUNS), fullgraph=True, backend=backend)
    actual, expected = (outcome(each, inputs, weights, NAMES) for each in (compiled, sla(RUNS)))
    for name, each in actual.items():
        assert relative(each, expected[name].double()) < 1e-2, name


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@LAYOUTS
def test_another_sparsity_in_a_tensor_compiles_nothing(case: Case, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    def attend(*inputs: Tensor) -> Any:
        *inputs, sparsity = inputs
        return sla(case, sparsity=sparsity)(*inputs)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    inputs = tensors(case)
    compilations = []
    for sparsity in (0.9, 0.7, 0.4, 0.0, 1.0):
        actual, _ = compiled(*inputs, torch.tensor(sparsity, dtype=torch.float64))
        ratio = max(1 - sparsity, 1e-3)
        expected, _ = sla(case, config=config_of(case, topk_ratio=round(ratio, 3)))(*inputs)
        torch.testing.assert_close(actual, expected)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 5


def joint(video: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Video of frames of 3 x 4 tokens, and text behind it, sizes read from the tensors."""
    x = torch.cat([video, text], dim=2)
    grid = (video.shape[2] // 12, 3, 4)
    config = cs.SLA(topk_ratio=0.4, block_q=(2, 2, 3), block_k=(1, 2, 2))
    where = {"grid_thw": grid, "text": cs.Text(after=text.shape[2])}
    return cs.attention(x, x, x, config, **where, proj=(weight, bias), return_lse=True)


def in_runs(video: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same in runs of the sequence."""
    x = torch.cat([video, text], dim=2)
    config = cs.SLA(topk_ratio=0.4, block_q=12, block_k=5)
    return cs.attention(x, x, x, config, proj=(weight, bias), return_lse=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [joint, in_runs])
@pytest.mark.parametrize(
    "training", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"]
)
def test_dynamic_lengths_take_at_most_two_compilations(
    training: bool, function: Any, backend: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for frames, text in ((3, 5), (6, 9), (9, 17)):
        inputs = [torch.randn(1, 2, n, 8) for n in (12 * frames, text)]
        inputs += [torch.randn(8, 8), torch.randn(8)]
        inputs = [each.requires_grad_(training) for each in inputs]
        (out, lse), expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close((out, lse), expected)
        if training:
            grads = torch.autograd.grad(out.square().sum(), inputs)
            expected_grads = torch.autograd.grad(expected[0].square().sum(), inputs)
            for actual, wanted in zip(grads, expected_grads, strict=True):
                assert_same_sums(actual, wanted)
    assert counter.frame_count <= 2


def counts(case: Case, inputs: Inputs, **changes: Any) -> set[int]:
    """Return how many key blocks are selected."""
    with Selections() as selections:
        sla(case, **changes)(*inputs)
    return selections.counts


@pytest.mark.parametrize(
    ("blocks", "sparsity", "kept"),
    [(20, 0.9, 2), (10, 0.9, 1), (10, 0.7, 3), (100, 0.71, 28), (10, 0.99, 1), (10, 0.0, 10)],
)
@pytest.mark.parametrize("given_as", ["config", "number", "tensor", "metadata"])
def test_a_sparsity_keeps_what_the_ratio_that_is_left_keeps(
    blocks: int, sparsity: float, kept: int, given_as: str
) -> None:
    ratio = round(1 - sparsity, 2) if given_as == "config" else 0.5
    case = Case((4 * blocks - 1,), (8,), (4,), ratio)
    tensor = torch.tensor(sparsity, dtype=torch.float64)
    given_sparsity = {"number": sparsity, "tensor": tensor}.get(given_as)
    call = sparsity if given_as == "metadata" else 0.25
    with cs.metadata(sparsity=None if given_as == "config" else call):
        assert counts(case, tensors(case), sparsity=given_sparsity) == {kept}


@given(st.integers(1, 120), st.floats(0, 1, exclude_max=True))
def test_a_sparsity_as_a_tensor_keeps_as_many_blocks_as_the_number(
    blocks: int, sparsity: float
) -> None:
    x = torch.zeros(1, 1, blocks, 1)
    case = Case((blocks,), (blocks,), (1,), 0.5)
    as_number = counts(case, [x, x, x], sparsity=sparsity)
    as_tensor = counts(case, [x, x, x], sparsity=torch.tensor(sparsity, dtype=torch.float64))
    assert as_number == as_tensor


@given(st.integers(1, 200), st.integers(0, 1000))
def test_a_sparsity_in_thousandths_keeps_what_its_ratio_keeps(
    blocks: int, thousandths: int
) -> None:
    x = torch.zeros(1, 1, blocks, 1)
    case = Case((blocks,), (blocks,), (1,), max(1 - thousandths / 1000, 1e-6))
    tensor = torch.tensor(thousandths / 1000, dtype=torch.float64)
    ratio = round(1000 - thousandths) / 1000
    assert counts(case, [x, x, x], sparsity=tensor) == {max(1, int(ratio * blocks))}


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_leaves_the_sparsity_alone(
    dtype: torch.dtype, case: Case
) -> None:
    inputs = tensors(case)
    sparsity = torch.tensor(0.7, dtype=torch.float64)
    with torch.autocast("cpu", dtype), Selections() as selections:
        out, _ = sla(case, sparsity=sparsity)(*inputs)
    assert out.dtype == dtype
    assert selections.counts == {max(1, int(0.3 * len(case.k_blocks)))}
    assert torch.equal(out, sla(case, sparsity=0.7)(*cast(inputs, dtype))[0])
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_call_compiled_under_autocast_gives_the_eager_values() -> None:
    inputs = tensors(RUNS)
    compiled = torch.compile(sla(RUNS), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(*inputs)[0], sla(RUNS)(*inputs)[0]
    assert torch.equal(out, expected)
    for one, other in zip(
        torch.autograd.grad(out.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert relative(one, other.double()) < 1e-2


def test_what_inference_mode_made_serves_training() -> None:
    tile_of_token.cache_clear()
    inputs = tensors(BOXES)
    with torch.inference_mode():
        out, _ = sla(BOXES)(*inputs)
    again, _ = sla(BOXES)(*inputs)
    assert torch.equal(out, again)
    assert all(bool((grad != 0).any()) for grad in torch.autograd.grad(again.sum(), inputs))


def test_a_changed_default_device_does_not_leak_in() -> None:
    case = BOXES._replace(key_mask=padding(BOXES))
    inputs = tensors(case)
    sparsity = torch.tensor(0.7, dtype=torch.float64)
    expected, _ = sla(case, sparsity=sparsity)(*inputs)
    tile_of_token.cache_clear()
    with torch.device("meta"):
        out, _ = sla(case, sparsity=sparsity)(*inputs)
    assert torch.equal(out, expected)


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_opcheck_accepts_the_op(masked: bool, case: Case) -> None:
    case = case._replace(key_mask=padding(case) if masked else None)
    q, k, v, *proj = tensors(case, kv_heads=1)
    qkv = [over_blhd(each) for each in (q, k, v)]
    where = (list(case.grid), list(case.q_tile), list(case.k_tile), *case.text)
    settings = (case.ratio, case.feature_map, None, *proj, case.scale)
    torch.library.opcheck(OPS.sla.default, (*qkv, case.key_mask, *where, *settings))
