"""The CPU kernels of attention over selected chunks against dense attention in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from types import ModuleType
from typing import Any

import helpers
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiled_sparse.errors import BlockListError
from compiled_sparse.ops.bit_masks import pack_bits
from compiled_sparse.ops.cpu import native_chunks
from compiled_sparse.ops.cpu import portable_chunks

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element nobody writes is NaN


@pytest.fixture(params=[native_chunks, portable_chunks], ids=["native", "portable"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@dataclass(frozen=True)
class Case:
    """Sizes of a problem; `density` is the share of chunks that a query selects."""

    grid: tuple[int, ...] = (5, 7, 3)
    tile: tuple[int, ...] = (2, 3, 3)
    text: tuple[int, int] = (0, 0)
    batch: int = 1
    heads: tuple[int, int] = (2, 2)
    dim: int = 16
    density: float = 0.4
    masked: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def length(self) -> int:
        return math.prod(self.grid) + sum(self.text)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    selected: Tensor
    key_mask: Tensor | None
    kv_tokens: Tensor
    scale: float
    seen: Tensor  # bool [B, Hq, L, L]

    @property
    def rest(self) -> tuple[Any, ...]:
        return self.selected, self.key_mask, self.kv_tokens, self.scale

    def attention(self, module: ModuleType) -> Callable[..., Any]:
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *qkv: Tensor) -> tuple[Tensor, Tensor]:
                outputs: tuple[Tensor, Tensor] = module.chunk_forward(*qkv, *self.rest)
                ctx.save_for_backward(*qkv, *outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                return module.chunk_backward(*gradients, *ctx.saved_tensors, *self.rest)

        function: Callable[..., Any] = Attention.apply
        return function

    def all_results(
        self, module: ModuleType, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Output, log-sum-exp and the gradients of q, k and v."""
        q, k, v = self.q, self.k, self.v
        saved = (q, k, v, *module.chunk_forward(q, k, v, *self.rest))
        return (*saved[3:], *module.chunk_backward(grad_out, grad_lse, *saved, *self.rest))


def make(case: Case, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    chunks = oracle.blocks(case.grid, case.tile, *case.text)
    tokens = torch.full((len(chunks), math.prod(case.tile)), -1, dtype=torch.int32)
    chosen = torch.rand(case.batch, case.heads[0], len(chunks), case.length) < case.density
    seen = torch.zeros(case.batch, case.heads[0], case.length, case.length, dtype=torch.bool)
    for i, chunk in enumerate(chunks):
        tokens[i, : len(chunk)] = torch.tensor(chunk)
        seen[..., chunk] = chosen[:, :, i, :, None]
    q, k, v = (
        torch.randn(case.batch, case.heads[int(i > 0)], case.length, case.dim).to(case.dtype)
        for i in range(3)
    )
    mask = torch.rand(case.batch, case.length) > 0.4 if case.masked else None
    return Inputs(q, k, v, pack_bits(chosen), mask, tokens, float(case.dim) ** -0.5, seen)


def random_gradients(x: Inputs) -> tuple[Tensor, Tensor]:
    return torch.randn_like(x.q), torch.randn(x.q.shape[:-1])


def assert_matches_dense(x: Inputs, module: ModuleType) -> None:
    helpers.assert_matches_oracle(
        x.attention(module), x.q, x.k, x.v, x.seen, key_mask=x.key_mask, scale=x.scale
    )


BASE = Case()
CASES = {
    "base": BASE,
    "bfloat16": replace(BASE, dtype=torch.bfloat16, dim=64),
    "float16": replace(BASE, dtype=torch.float16, masked=True, heads=(4, 2)),
    "text": replace(BASE, text=(5, 40)),
    "mask": replace(BASE, batch=2, masked=True, text=(1, 0)),
    "grouped heads": replace(BASE, batch=2, heads=(6, 2)),
    "dim 64": replace(BASE, dim=64),
    "dim 80": replace(BASE, dim=80),
    "dim 1": replace(BASE, dim=1),
    "chunks of several steps": replace(BASE, grid=(8, 7, 6), tile=(4, 7, 5)),
    "single-token chunks": replace(BASE, tile=(1, 1, 1), density=0.1),
    "one chunk": replace(BASE, tile=(5, 7, 3), density=0.7),
    "one token": replace(BASE, grid=(1,), tile=(1,), density=1.0),
    "everything": replace(BASE, density=1.0),
    "nothing": replace(BASE, density=0.0),
    "most queries select nothing": replace(BASE, density=0.02),
    "whole words": replace(BASE, grid=(4, 8, 4), tile=(4, 4, 4)),
    "several segments": replace(BASE, grid=(11, 10, 13), tile=(4, 5, 6), heads=(1, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_match_dense(kernel: ModuleType, case: Case) -> None:
    assert_matches_dense(make(case), kernel)


@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    text=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dim=st.integers(1, 40),
    density=st.sampled_from([0.05, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
def test_native_matches_dense_at_any_size(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    text: tuple[int, int],
    dim: int,
    density: float,
    seed: int,
) -> None:
    case = Case(grid=grid, tile=tile, text=text, dim=dim, density=density, masked=True)
    assert_matches_dense(make(case, seed), native_chunks)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (2, 2)])
def test_both_kernels_agree_in_float64_over_several_segments(heads: tuple[int, int]) -> None:
    case = Case(grid=(11, 10, 13), tile=(4, 5, 6), text=(3, 130), batch=2, heads=heads)
    x = make(replace(case, masked=True, dtype=torch.float64))
    gradients = torch.randn_like(x.q), torch.randn_like(x.q[..., 0])
    results = x.all_results(native_chunks, *gradients)
    for got, expected in zip(results, x.all_results(portable_chunks, *gradients), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck(kernel: ModuleType) -> None:
    case = Case(grid=(2, 3, 2), tile=(1, 2, 2), heads=(2, 1), dim=3, dtype=torch.float64)
    x = make(replace(case, density=0.8))
    assert x.seen.any(-1).all()
    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    assert torch.autograd.gradcheck(x.attention(kernel), inputs)


def test_results_lie_with_heads_inside(kernel: ModuleType) -> None:
    x = make(replace(BASE, batch=2, heads=(4, 2)))
    out, lse, *gradients = x.all_results(kernel, *random_gradients(x))
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *gradients))
    assert lse.is_contiguous()


def test_masked_values_never_matter(kernel: ModuleType) -> None:
    clean = make(replace(BASE, batch=2, masked=True))
    assert clean.key_mask is not None
    hidden = ~clean.key_mask[:, None, :, None]
    k, v = (t.masked_fill(hidden, float("nan")) for t in (clean.k, clean.v))
    gradients = random_gradients(clean)
    poisoned = replace(clean, k=k, v=v).all_results(kernel, *gradients)
    for expected, got in zip(clean.all_results(kernel, *gradients), poisoned, strict=True):
        assert torch.equal(expected, got)
    assert not poisoned[3].masked_fill(~hidden, 0).any()
    assert not poisoned[4].masked_fill(~hidden, 0).any()


def test_bits_past_the_length_do_not_matter(kernel: ModuleType) -> None:
    x = make(BASE)
    used = x.q.shape[2] % 32
    assert used
    selected = x.selected.clone()
    selected[..., -1] |= -1 << used
    gradients = random_gradients(x)
    got = replace(x, selected=selected).all_results(kernel, *gradients)
    for a, b in zip(x.all_results(kernel, *gradients), got, strict=True):
        assert torch.equal(a, b)


def test_queries_without_keys_give_zero_and_no_gradient(kernel: ModuleType) -> None:
    x = make(BASE)
    dead = torch.rand(x.q.shape[2]) > 0.6
    selected = x.selected & pack_bits(~dead)
    grad_out, grad_lse = random_gradients(x)
    grad_out[:, :, dead] = float("inf")
    out, lse, *gradients = replace(x, selected=selected).all_results(kernel, grad_out, grad_lse)
    assert not out[:, :, dead].any()
    assert (lse[:, :, dead] == float("-inf")).all()
    assert not gradients[0][:, :, dead].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_lse_may_have_no_gradient(kernel: ModuleType) -> None:
    x = make(BASE)
    grad_out, grad_lse = random_gradients(x)
    absent = x.all_results(kernel, grad_out, None)
    zero = x.all_results(kernel, grad_out, torch.zeros_like(grad_lse))
    assert all(torch.equal(a, b) for a, b in zip(absent, zero, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
    ],
    ids=["heads inside", "last stride", "slice of a fused projection"],
)
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    x = make(replace(BASE, batch=2))
    gradients = random_gradients(x)
    strided = replace(x, q=layout(x.q), k=layout(x.k), v=layout(x.v), selected=layout(x.selected))
    assert strided.q.stride() != x.q.stride()
    got = strided.all_results(native_chunks, layout(gradients[0]), gradients[1])
    for a, b in zip(x.all_results(native_chunks, *gradients), got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("two_threads")
def test_native_results_repeat_bit_for_bit() -> None:
    x = make(Case(grid=(11, 10, 13), tile=(4, 5, 6), heads=(3, 1)))
    gradients = random_gradients(x)
    first = x.all_results(native_chunks, *gradients)
    for _ in range(3):
        again = x.all_results(native_chunks, *gradients)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.masked_fill_(t == 104, 105),
        lambda t: t.masked_fill_(t == 104, -1),
        lambda t: t.masked_fill_(t == -1, 0),
    ],
    ids=["token", "missing token", "token too many"],
)
def test_native_refuses_to_leave_the_tensors(damage: Callable[[Tensor], object]) -> None:
    x = make(BASE)
    damage(x.kv_tokens)
    with pytest.raises(BlockListError, match="point outside the tensors"):
        native_chunks.chunk_forward(x.q, x.k, x.v, *x.rest)


@pytest.mark.parametrize("heads", [0, 2])
def test_no_query_is_no_work(heads: int) -> None:
    x = make(BASE)
    empty = replace(
        x, q=x.q[:0, :heads], k=x.k[:0, :heads], v=x.v[:0, :heads], selected=x.selected[:0]
    )
    out, lse = native_chunks.chunk_forward(empty.q, empty.k, empty.v, *empty.rest)
    assert out.shape == (0, heads, 105, 16)
    assert lse.shape == (0, heads, 105)
