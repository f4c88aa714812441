"""The wording of the errors of operators and reference; see `tests/test_messages.py`."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from messages import Case
from messages import assert_wording
from messages import raise_statements
from messages import raised_at

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse.config import Auto
from compiled_sparse.config import MechanismConfig
from compiled_sparse.ops import gpu_quantized

MODULES = (
    "ops/attention",
    "ops/checks",
    "ops/block_sparse",
    "ops/chunk_attention",
    "ops/differentiable",
    "ops/gpu_quantized",
    "ops/quantized",
    "ops/video",
    "ops/sla",
    "ops/vsa",
    "reference/attention",
)
GRID = (2, 3, 2)
VSA = cs.VSA(sparsity=0.5, tile_thw=(2, 2, 2))
SLA = cs.SLA(topk_ratio=0.5, block_q=(2, 2, 2), block_k=(1, 3, 2))
Q = torch.zeros(2, 4, 12, 8)
INDICES, COUNTS = helpers.full_lists(12, 12)
WIDE_Q = torch.zeros(1, 1, 12, 64)


def call(**changes: Any) -> Any:
    """Call the kernel op with something changed."""
    geometry = {"grid": (12,), "q_tile": (1,), "kv_tile": (1,)}
    tensors = {"q": Q, "k": Q, "v": Q, "block_indices": INDICES, "block_counts": COUNTS}
    return cs.ops.block_sparse_attention(**{**tensors, **geometry, **changes})


def call_quantized(**changes: Any) -> Any:
    """Call the quantised kernel op with something changed."""
    geometry = {"grid": (12,), "q_tile": (1,), "kv_tile": (1,)}
    q = changes.pop("q", WIDE_Q)
    return cs.ops.quantized_block_sparse_attention(
        q, q, q, INDICES, COUNTS, **{**geometry, **changes}
    )


def attend(config: MechanismConfig, module: Any = cs, **changes: Any) -> Any:
    """Call `attention` of the package or of the reference with something changed."""
    arguments = {"q": Q, "k": Q, "v": Q, "config": config, "grid_thw": GRID, **changes}
    return module.attention(**arguments)


def differentiate_twice() -> None:
    q = Q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(q=q)[0].sum(), q, create_graph=True)
    grad.sum().backward()


CASES = {
    "not callable": Case(
        errors.ConfigError,
        "no mechanism that can be called",
        "Auto(",
        "STA(...) or Dense()",
        "compile backend",
        lambda: attend(Auto()),
    ),
    "no grid": Case(
        errors.MissingGridError,
        "sta needs the token grid",
        "grid_thw=None",
        "(T, H, W)",
        "counted after patching",
        lambda: attend(cs.STA(), grid_thw=None),
    ),
    "cross": Case(
        errors.ShapeError,
        "sta needs queries and keys of one sequence",
        "12 queries, 10 keys",
        "equal lengths",
        "leave cross-attention dense",
        lambda: attend(cs.STA(), k=Q[:, :, :10]),
    ),
    "values of other tokens": Case(
        errors.ShapeError,
        "keys and values are of different lengths",
        "12 keys, 10 values",
        "equal lengths",
        "of the same tokens",
        lambda: attend(cs.Dense(), v=Q[:, :, :10]),
    ),
    "dense lse": Case(
        errors.ConfigError,
        "dense attention does not return the log-sum-exp",
        "return_lse=True",
        "return_lse=False",
        "cs.reference.attention",
        lambda: attend(cs.Dense(), return_lse=True),
    ),
    "rank": Case(
        errors.ShapeError,
        "k has the wrong rank",
        "k of shape (4, 12, 8)",
        "[batch, heads, length, head_dim]",
        "reshape k",
        lambda: call(k=Q[0]),
    ),
    "dtypes": Case(
        errors.DtypeError,
        "unsupported or different dtypes",
        "v torch.float64",
        "torch.float32, torch.bfloat16",
        "cast q, k and v",
        lambda: call(v=Q.double()),
    ),
    "dtype of one tensor": Case(
        errors.DtypeError,
        "x has an unsupported dtype",
        "torch.int32",
        "one dtype among torch.float32",
        "cast x to one of these",
        lambda: cs.ops.tile_mean(Q.int(), grid=(12,), tile=(4,)),
    ),
    "mask dtype": Case(
        errors.DtypeError,
        "key_mask is not boolean",
        "torch.float32",
        "torch.bool, True where",
        "mask != 0",
        lambda: call(key_mask=torch.ones(2, 12)),
    ),
    "devices": Case(
        errors.DeviceError,
        "on different devices",
        "cpu, meta",
        "on one device",
        "move them to cpu",
        lambda: call(v=Q.to("meta")),
    ),
    "shapes": Case(
        errors.ShapeError,
        "q, k and v do not fit each other",
        "k (2, 3, 12, 8)",
        "Hq a multiple of Hk",
        "order of the axes",
        lambda: call(k=Q[:, :3]),
    ),
    "mask shape": Case(
        errors.ShapeError,
        "key_mask has the wrong shape",
        "(2, 1, 1, 12)",
        "[batch, key length] = (2, 12)",
        "without head or query axes",
        lambda: call(key_mask=torch.ones(2, 1, 1, 12).bool()),
    ),
    "length": Case(
        errors.LayoutError,
        "do not add up to the length of q",
        "length 12, grid (11,), text 0 before",
        "length 11",
        "after patching",
        lambda: call(grid=(11,)),
    ),
    "sparsity as a tensor": Case(
        errors.DtypeError,
        "the sparsity is no float64 tensor without axes",
        "torch.float32 of shape (1,)",
        "one number in float64",
        "dtype=torch.float64",
        lambda: attend(cs.VSA(), sparsity=torch.ones(1)),
    ),
    "shape of a gate": Case(
        errors.ShapeError,
        "the gate has another shape than the queries",
        "gate (2, 1, 12, 8), q (2, 4, 12, 8)",
        "text included",
        "reshape it as the queries are",
        lambda: attend(VSA, gate=Q[:, :1]),
    ),
    "shape of a projection": Case(
        errors.ShapeError,
        "the projection does not fit the heads",
        "weight (8, 4), bias (8,)",
        "[head_dim, head_dim] = (8, 8), bias [head_dim]",
        "nn.Linear(head_dim, head_dim)",
        lambda: attend(SLA, proj=(torch.zeros(8, 4), torch.zeros(8))),
    ),
    "dtype of a gate": Case(
        errors.DtypeError,
        "the gate has another dtype than the queries",
        "gate torch.bfloat16, q torch.float32",
        "one dtype",
        ".to(q.dtype)",
        lambda: attend(VSA, gate=Q.bfloat16()),
    ),
    "list dtype": Case(
        errors.DtypeError,
        "block lists are not int32",
        "block_counts torch.int64",
        "torch.int32",
        ".to(torch.int32)",
        lambda: call(block_counts=COUNTS.long()),
    ),
    "list shape": Case(
        errors.ShapeError,
        "block lists have the wrong shape",
        "(1, 1, 11, 12)",
        "[1 or 2, 1 or 4, 12, K]",
        "one row per query block",
        lambda: call(block_indices=INDICES[:, :, :11]),
    ),
    "counts": Case(
        errors.BlockListError,
        "block_counts is out of range",
        "13 to 13",
        "0 to 12",
        "valid leading entries",
        lambda: call(block_counts=COUNTS + 1),
    ),
    "indices": Case(
        errors.BlockListError,
        "outside the key blocks",
        "index 12",
        "0 to 11",
        "the lists were made for",
        lambda: call(block_indices=INDICES + 1),
    ),
    "selection of chunks": Case(
        errors.BlockListError,
        "the selection does not fit the queries and chunks",
        "torch.int32 of shape (2, 4, 12, 12)",
        "(2, 4, 3, 1)",
        "ops.pack_bits",
        lambda: cs.ops.chunk_sparse_attention(
            Q, Q, Q, torch.zeros(2, 4, 12, 12, dtype=torch.int32), grid=(12,), tile=(4,)
        ),
    ),
    "layer and step": Case(
        errors.ConfigError,
        "the config differs by layer or step, and which one this is, is not given",
        "layer=None, step=None for vmoba",
        "the layer's index",
        "pass layer= and step= to cs.attention",
        lambda: cs.attention(Q, Q, Q, cs.VMoBA(), grid_thw=GRID),
    ),
    "second derivative": Case(
        errors.DoubleBackwardError,
        "differentiable only once",
        "second derivative",
        "first derivatives only",
        "cs.reference.attention",
        differentiate_twice,
    ),
    "quantised float64": Case(
        errors.DtypeError,
        "quantised attention does not take this dtype",
        "torch.float64",
        "one of torch.float32, torch.bfloat16, torch.float16",
        "use block_sparse_attention",
        lambda: call_quantized(q=WIDE_Q.double()),
    ),
    "quantised head size": Case(
        errors.ShapeError,
        "quantised attention does not take this head size",
        "head_dim 8",
        "one of 64, 128",
        "SLA(...)",
        lambda: call_quantized(q=Q[:1, :1]),
    ),
    "quantised values": Case(
        errors.ConfigError,
        "values is no way to hold values",
        "'int4'",
        "'auto', 'float8', 'float16'",
        "leave it out",
        lambda: call_quantized(values="int4"),
    ),
    "quantised gradient": Case(
        errors.ForwardOnlyError,
        "cannot be differentiated",
        "gradients enabled",
        "under torch.no_grad()",
        "use SLA(...) for training",
        lambda: call_quantized(q=WIDE_Q.clone().requires_grad_()),
    ),
    "no float8": Case(
        errors.DeviceError,
        "no matrix instructions for float8_e4m3fn",
        "values='float8'",
        "before sm_89",
        "leave values out",
        lambda: gpu_quantized.resolve("float8", has_float8=False),
    ),
    "no reference": Case(
        errors.ConfigError,
        "this config has no reference",
        "Auto(",
        "such as STA(...)",
        "one mechanism",
        lambda: attend(Auto(), cs.reference),
    ),
    "reference without grid": Case(
        errors.MissingGridError,
        "sta needs the token grid",
        "grid_thw=None",
        "(T, H, W)",
        "counted after patching",
        lambda: attend(cs.STA(), cs.reference, grid_thw=None),
    ),
    "reference length": Case(
        errors.LayoutError,
        "do not add up to the lengths of q and k",
        "12 queries, 12 keys, grid (2, 3, 3)",
        "length 18",
        "after patching",
        lambda: attend(cs.STA(), cs.reference, grid_thw=(2, 3, 3)),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_message_says_what_got_expected_and_next(case: Case) -> None:
    assert_wording(case)


def test_every_error_has_a_case_for_its_wording() -> None:
    assert raise_statements(MODULES) == raised_at(CASES.values())


def heads(count: int, head_dim: int = 8) -> torch.Tensor:
    return torch.zeros(2, count, 12, head_dim)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": heads(3), "v": heads(3)},
        {"k": heads(8), "v": heads(8)},
        {"k": heads(0), "v": heads(0)},
        {"k": heads(4)[:1], "v": heads(4)[:1]},
        {"k": heads(4, 16), "v": heads(4, 16)},
        {"v": heads(4, 16)},
        {"v": heads(4)[:, :, :11]},
        {"q": heads(4, 513), "k": heads(4, 513), "v": heads(4, 513)},
        {"q": heads(4, 0), "k": heads(4, 0), "v": heads(4, 0)},
    ],
    ids=lambda changes: ", ".join(f"{k} {tuple(v.shape)}" for k, v in changes.items()),
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, torch.Tensor]) -> None:
    with pytest.raises(errors.ShapeError, match="q, k and v do not fit each other"):
        call(**changes)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("change", [lambda x: x[0], lambda x: x[None]], ids=["3-D", "5-D"])
def test_each_tensor_of_another_rank_is_named(name: str, change: Any) -> None:
    with pytest.raises(errors.ShapeError, match=f"{name} has the wrong rank"):
        call(**{name: change(Q)})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_without_arithmetic_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(errors.DtypeError, match="unsupported or different dtypes"):
        call(q=Q.to(dtype), k=Q.to(dtype), v=Q.to(dtype))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_each_tensor_of_another_dtype_is_refused(name: str) -> None:
    with pytest.raises(errors.DtypeError, match=f"{name} torch.bfloat16"):
        call(**{name: Q.bfloat16()})


@pytest.mark.parametrize("shape", [(2,), (2, 11), (1, 12), (12, 2), (2, 4, 12)], ids=str)
def test_a_key_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.ShapeError, match="key_mask has the wrong shape"):
        call(key_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("name", ["block_indices", "block_counts"])
def test_each_list_of_another_dtype_is_refused(name: str) -> None:
    lists = {"block_indices": INDICES, "block_counts": COUNTS}
    with pytest.raises(errors.DtypeError, match=rf"{name} torch\.int64"):
        call(**{name: lists[name].long()})


@pytest.mark.parametrize(
    "shape", [(12,), (1, 12), (2, 3, 12), (3, 1, 12), (1, 2, 12), (1, 1, 13)], ids=str
)
def test_lists_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    indices = torch.zeros(*shape, 2, dtype=torch.int32)
    counts = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(errors.ShapeError, match="block lists have the wrong shape"):
        call(block_indices=indices, block_counts=counts)


@pytest.mark.parametrize("index", [-1, 12, 2**31 - 1])
def test_an_index_outside_the_key_blocks_is_refused(index: int) -> None:
    indices = INDICES.clone()
    indices[0, 0, 5, 3] = index
    with pytest.raises(errors.BlockListError, match=f"index {index}"):
        call(block_indices=indices)


@pytest.mark.parametrize("count", [-1, 13])
def test_a_count_outside_the_list_is_refused(count: int) -> None:
    counts = COUNTS.clone()
    counts[0, 0, 5] = count
    with pytest.raises(errors.BlockListError, match="block_counts is out of range"):
        call(block_counts=counts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grid": (2, 5)}, errors.LayoutError, "different numbers of axes"),
        ({"grid": (2, 6), "q_tile": (1, 1), "kv_tile": (1,)}, errors.LayoutError, "axes"),
        ({"grid": (0,)}, errors.LayoutError, "grid is not a tuple of axis lengths"),
        ({"kv_tile": (0,)}, errors.LayoutError, "tile is not a tuple of axis lengths"),
        ({"text_after": 1}, errors.LayoutError, "do not add up to the length of q"),
        ({"text_before": -1}, errors.LayoutError, r"Text\.before"),
        (
            {
                "grid": (3, 4),
                "q_tile": (3, 4),
                "kv_tile": (3, 4),
                "k": Q[:, :, :9],
                "v": Q[:, :, :9],
            },
            errors.LayoutError,
            "do not add up to the length of k",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_geometry_that_does_not_describe_the_tensors_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)
