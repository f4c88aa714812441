"""Quantised sparse-linear attention: beside its reference, beside `SLA`, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import RecordingBackend
from quantized import assert_emulates
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.errors import ForwardOnlyError
from compiled_sparse.errors import ShapeError

LENGTH = 700
RUNS = {"block_q": 128, "block_k": 64}
HOPPER = {"block_q": 64, "block_k": 128}
BOXES = {"block_q": (4, 4, 8), "block_k": (2, 4, 4)}
GRID = (7, 9, 11)
TEXT = cs.Text(before=5, after=2)


def inputs(
    dtype: torch.dtype = torch.float32, head_dim: int = 64, key_heads: int = 2
) -> list[Tensor]:
    """Return queries, keys and values in quarters, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    return [
        ((4 * torch.randn(2, heads, LENGTH, head_dim, generator=generator)).round() / 4).to(dtype)
        for heads in (2, key_heads, key_heads)
    ]


def projection(head_dim: int = 64) -> tuple[Tensor, Tensor]:
    """Return weight and bias that are not zero."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(head_dim, head_dim, generator=generator) / head_dim**0.5
    return weight, torch.randn(head_dim, generator=generator)


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of two tensors."""
    flat = (each.double().flatten() for each in (one, other))
    return float(F.cosine_similarity(*flat, dim=0))


@pytest.mark.parametrize("blocks", [RUNS, HOPPER, BOXES], ids=["runs", "hopper", "boxes"])
@pytest.mark.parametrize("values", ["float8", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_masked", [False, True])
def test_it_is_its_reference(
    blocks: dict[str, Any],
    values: str,
    dtype: torch.dtype,
    is_masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The native kernel rounds beside the maximum of 64 keys: portable is exact for all blocks.
    monkeypatch.setenv("COMPILED_SPARSE_CPU_KERNEL", "portable")
    q, k, v = inputs(dtype, key_heads=1)
    mask = None
    if is_masked:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[1, 500:] = False
        k = k.masked_fill(~mask[:, None, :, None], float("nan"))
    config = cs.SageSLA(topk_ratio=0.4, values=values, **blocks)
    where = {"grid_thw": GRID, "text": TEXT, "key_mask": mask, "return_lse": True}
    actual = cs.attention(q, k, v, config, **where)
    expected = cs.reference.attention(q, k, v, config, **where)
    assert all(bool(each.isfinite().all()) for each in actual)
    assert_emulates(actual, expected, v)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_close_to_what_it_approximates(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype, head_dim)
    outputs = [
        cs.attention(q, k, v, kind(topk_ratio=0.5), proj=projection(head_dim))
        for kind in (cs.SageSLA, cs.SLA)
    ]
    assert cosine(*outputs) > 0.999


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaled", ["keys", "values", "keys and values"])
@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["centred", "far from zero"])
def test_channels_of_very_different_size_are_borne(
    head_dim: int, scaled: str, offset: float
) -> None:
    q, k, v = inputs(torch.bfloat16, head_dim)
    order = torch.randperm(head_dim, generator=torch.Generator().manual_seed(2))
    sizes = torch.logspace(0, 2, head_dim)[order].bfloat16()
    if "keys" in scaled:
        k = (k + offset) * sizes
    if "values" in scaled:
        v = v * sizes
    config = {"topk_ratio": 0.5, "proj": None}
    outputs = [cs.attention(q, k, v, kind(**config)) for kind in (cs.SageSLA, cs.SLA)]
    assert cosine(*outputs) > 0.99


def test_the_linear_branch_is_not_quantised() -> None:
    q, k, v = inputs()
    proj = projection()
    branches = [
        cs.attention(q, k, v, kind(topk_ratio=0.5), proj=proj)
        - cs.attention(q, k, v, kind(topk_ratio=0.5))
        for kind in (cs.SageSLA, cs.SLA)
    ]
    torch.testing.assert_close(*branches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [1e-6, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 129])
def test_nothing_is_ever_not_a_number(ratio: float, length: int) -> None:
    q, k, v = (each[:, :, :length] for each in inputs())
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, :5] = True  # the second sequence has no key at all
    out = cs.attention(q, k, v, cs.SageSLA(topk_ratio=ratio), key_mask=mask, proj=projection())
    assert bool(out.isfinite().all())


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_into_one_graph_for_any_sparsity() -> None:
    q, k, v = inputs()
    config, proj = cs.SageSLA(topk_ratio=0.4), projection()

    def attend(q: Tensor, k: Tensor, v: Tensor, sparsity: Tensor) -> Tensor:
        return cs.attention(q, k, v, config, proj=proj, sparsity=sparsity)

    compiled = torch.compile(attend, fullgraph=True)
    for number in (0.25, 0.5, 0.9):
        actual = compiled(q, k, v, torch.tensor(number, dtype=torch.float64))
        expected = cs.attention(q, k, v, config, proj=proj, sparsity=number)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_refused_before_anything_is_computed() -> None:
    q, k, v = inputs()
    with pytest.raises(ForwardOnlyError, match="use SLA"):
        cs.attention(q, k.requires_grad_(), v, cs.SageSLA())
    with torch.no_grad():
        cs.attention(q, k, v, cs.SageSLA())


def test_other_head_sizes_are_refused() -> None:
    q = torch.randn(1, 1, 64, 32)
    with pytest.raises(ShapeError, match="64"):
        cs.attention(q, q, q, cs.SageSLA())


class Attention(nn.Module):
    """Self-attention of two heads over a sequence that is a video."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 2 * head_dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (
            each(x).unflatten(2, (2, -1)).transpose(1, 2)
            for each in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def decide(head_dim: int, *, with_gradients: bool = False) -> list[str]:
    """Return what becomes of the attention call of an attached module."""
    module = cs.sparse(cs.SageSLA(topk_ratio=0.4))(Attention(head_dim))
    backend = RecordingBackend("dense")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(with_gradients), cs.metadata(grid_thw=(3, 8, 9)):
        compiled(torch.randn(1, 3 * 8 * 9, 32))
    return backend.outcomes


def test_the_pass_takes_what_the_op_takes() -> None:
    assert decide(64) == decide(128) == ["sparse"]
    assert decide(32) == ["head_dim_unsupported"]
    assert decide(64, with_gradients=True) == ["forward_only"]


@pytest.mark.usefixtures("fresh_compiler")
def test_an_attached_module_computes_both_branches() -> None:
    sage = cs.SageSLA(topk_ratio=0.4, block_q=32, block_k=16)
    module = cs.sparse(sage)(Attention(64)).eval()
    weight, bias = projection()
    module.get_submodule("proj_l").load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(2, 3 * 8 * 9, 32)
    compiled = torch.compile(module, backend="compiled_sparse", options={"inner": "eager"})
    config = cs.SLA(topk_ratio=0.4, block_q=32, block_k=16)
    with torch.no_grad(), cs.metadata(grid_thw=(3, 8, 9)):
        actual = compiled(x)
        projections = (module.to_q, module.to_k, module.to_v)
        q, k, v = (each(x).unflatten(2, (2, -1)).transpose(1, 2) for each in projections)
        exact = cs.attention(q, k, v, config, proj=(weight, bias)).transpose(1, 2).flatten(2)
    assert 0.999 < cosine(actual, exact) < 1 - 1e-9
