"""The block map and the means of runs, against the published functions in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.errors import DeviceError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ShapeError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def published_pool(x: Tensor, block: int) -> Tensor:
    """Sums of float32 over the true length of each run, in the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    runs = [run.sum(2) / run.shape[2] for run in wide.split(block, dim=2)]
    return torch.stack(runs, dim=2).to(x.dtype)


def published_scores(q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """Pooled queries by pooled keys less their mean, all in the dtype of the inputs."""
    smooth = k - k.mean(dim=-2, keepdim=True)
    return published_pool(q, block_q) @ published_pool(smooth, block_k).transpose(-1, -2)


def chosen(sparse_map: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in sparse_map.flatten(0, -2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 3, 7, 64, 100])
@pytest.mark.parametrize("length", [1, 64, 65, 100, 127])
def test_means_are_of_the_true_length_of_each_run(
    length: int, block: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, length, 5).to(dtype)
    pooled = cs.mean_pool(x, block)
    assert pooled.shape == (2, 3, math.ceil(length / block), 5)
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": 0.01, "atol": 1e-3}
    torch.testing.assert_close(pooled, published_pool(x, block), **tolerance)


def test_strides_do_not_matter_and_gradients_flow_through_means() -> None:
    x = torch.randn(2, 10, 3, 4, dtype=torch.float64).transpose(1, 2).requires_grad_()
    torch.testing.assert_close(cs.mean_pool(x, 4), published_pool(x, 4))
    assert torch.autograd.gradcheck(lambda each: cs.mean_pool(each, 4), x)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (16, 8), (7, 11)], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.5, 1.0])
def test_the_blocks_are_those_of_the_published_function(
    ratio: float, blocks: tuple[int, int], dtype: torch.dtype
) -> None:
    q, k = (torch.randn(2, 3, 515, 16).to(dtype) for _ in range(2))
    sparse_map, lut, topk = cs.get_block_map(q, k, ratio, *blocks)
    scores = published_scores(q, k, *blocks)
    assert topk == max(1, int(ratio * scores.shape[-1]))
    expected = scores.topk(topk, dim=-1, sorted=False).indices.sort(dim=-1).values
    assert (sparse_map.dtype, lut.dtype) == (torch.int8, torch.int64)
    assert torch.equal(lut, expected)
    assert torch.equal(sparse_map, torch.zeros_like(sparse_map).scatter(-1, expected, 1))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_nearly_every_row_in_low_precision_is_that_of_the_published_function(
    dtype: torch.dtype,
) -> None:
    q, k = (torch.randn(2, 4, 1000, 32).to(dtype) for _ in range(2))
    sparse_map, _, topk = cs.get_block_map(q, k, 0.25, 16, 16)
    scores = published_scores(q, k, 16, 16)
    expected = torch.zeros_like(sparse_map).scatter(-1, scores.topk(topk).indices, 1)
    assert float((sparse_map == expected).all(-1).double().mean()) > 0.97


def test_queries_and_keys_may_differ_in_length_and_in_heads() -> None:
    q, k = torch.randn(1, 4, 100, 8), torch.randn(1, 2, 37, 8)
    sparse_map, lut, topk = cs.get_block_map(q, k, 0.5, 10, 5)
    assert (tuple(sparse_map.shape), tuple(lut.shape), topk) == ((1, 4, 10, 8), (1, 4, 10, 4), 4)
    again = cs.get_block_map(q, k.repeat_interleave(2, dim=1), 0.5, 10, 5)
    assert torch.equal(sparse_map, again[0])


def test_a_ratio_that_leaves_nothing_leaves_one_block_and_equal_scores_the_first() -> None:
    q, k = torch.zeros(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    for ratio in (0.0, 0.05):
        sparse_map, lut, topk = cs.get_block_map(q, k, ratio, 4, 4)
        assert topk == 1
        assert not lut.any()
        assert chosen(sparse_map) == [[0]] * 10


def test_the_map_is_what_the_op_attends_to() -> None:
    q, k = torch.randn(1, 2, 61, 8), torch.randn(1, 2, 61, 8)
    v = torch.randn(1, 2, 61, 8, requires_grad=True)
    config = cs.SLA(topk_ratio=0.3, block_q=8, block_k=4)
    out = cs.attention(q, k, v, config)
    sparse_map, _, _ = cs.get_block_map(q, k, 0.3, 8, 4)
    for head in range(2):
        for row in range(8):
            (grad,) = torch.autograd.grad(out[0, head, 8 * row].sum(), v, retain_graph=True)
            reached = torch.stack([run.any() for run in grad[0, head].split(4)])
            assert torch.equal(reached, sparse_map[0, head, row].bool())


def test_the_map_passes_no_gradient_on() -> None:
    q = torch.randn(1, 1, 40, 4, requires_grad=True)
    assert not any(each.requires_grad for each in cs.get_block_map(q, q, 0.3, 8, 4)[:2])


X = torch.zeros(2, 4, 12, 8)


@pytest.mark.parametrize(
    ("error", "k"),
    [
        (ShapeError, X[..., :4]),
        (ShapeError, X[:1]),
        (ShapeError, X[:, :3]),
        (ShapeError, X[:, :0]),
        (DtypeError, X.double()),
        (DtypeError, X.int()),
        (DeviceError, X.to("meta")),
    ],
    ids=["head size", "batch", "heads", "no heads", "dtypes", "integers", "devices"],
)
def test_queries_and_keys_that_do_not_fit_are_refused(
    error: type[CompiledSparseError], k: Any
) -> None:
    with pytest.raises(error):
        cs.get_block_map(X, k, 0.5)


def test_means_of_integers_are_refused() -> None:
    with pytest.raises(DtypeError):
        cs.mean_pool(X.int(), 4)


@pytest.mark.usefixtures("fresh_compiler")
def test_both_can_be_compiled() -> None:
    q, k = torch.randn(1, 2, 61, 8), torch.randn(1, 2, 61, 8)

    def both(q: Tensor, k: Tensor) -> Any:
        return cs.get_block_map(q, k, 0.3, 8, 4), cs.mean_pool(q, 8)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), both(q, k))
