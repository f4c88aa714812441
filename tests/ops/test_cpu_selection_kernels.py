"""The CPU kernel that selects chunks for each query against the rules, query by query."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selecting import BASE
from selecting import QUARTERS
from selecting import SIZES
from selecting import Case
from selecting import Inputs
from selecting import expected
from selecting import make
from selecting import ranked
from torch import Tensor

from compiled_sparse.errors import BlockListError
from compiled_sparse.ops import cpu
from compiled_sparse.ops.bit_masks import unpack_bits
from compiled_sparse.ops.cpu import native_selection

LOWEST = float("-inf")


def _slow(number: float) -> Any:
    return pytest.param(number, marks=pytest.mark.slow)


def select(x: Inputs) -> Tensor:
    """What the kernel selects: bool [B, Hq, chunks, L]."""
    words = x.call(native_selection.select_per_query)
    assert not unpack_bits(words, 32 * words.shape[-1])[..., x.q.shape[2] :].any()
    return unpack_bits(words, x.q.shape[2])


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("count", [*map(_slow, (-1, 1)), 0, 3, 1000])
def test_the_best_by_count(case: Case, count: int) -> None:
    x = make(replace(case, count=count))
    assert torch.equal(select(x), expected(x))


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("threshold", [0.0, 0.25, *map(_slow, (1.0, 1.5))])
def test_the_best_by_share(case: Case, threshold: float) -> None:
    x = make(replace(case, mode="threshold", threshold=threshold))
    assert torch.equal(select(x), expected(x))


@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    text=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dim=st.integers(1, 20),
    values=st.sampled_from(["quarters", "tied"]),
    mode=st.sampled_from(["topk", "threshold"]),
    count=st.integers(0, 9),
    threshold=st.floats(0, 1.2),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_rules_hold_at_any_size(seed: int, **fields: object) -> None:
    x = make(replace(Case(heads=(1, 1)), **fields), seed)  # type: ignore[arg-type]
    assert torch.equal(select(x), expected(x))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_threads_and_strides_do_not_matter(mode: str) -> None:
    x = make(replace(QUARTERS, mode=mode))
    strided = replace(
        x,
        q=x.q.transpose(1, 2).contiguous().transpose(1, 2),
        means=x.means.mT.contiguous().mT,
        own=torch.stack([x.own, x.own + 1], -1)[:, 0],
    )
    assert strided.q.stride() != x.q.stride()
    assert torch.equal(select(strided), expected(x))


def test_zeros_of_both_signs_are_equal() -> None:
    x = make(replace(BASE, dim=1, count=3))
    x.q.fill_(1e-30)
    signs = torch.where(torch.arange(x.means.shape[2]) % 2 == 0, -1.0, 1.0)
    tiny = replace(x, means=torch.full_like(x.means, 1e-30) * signs[:, None])
    gates = tiny.q[0, 0, 0] * tiny.means[0, 0, :, 0]
    assert not gates.any()
    assert gates.signbit().any()
    assert torch.equal(select(tiny), expected(tiny))


def test_nan_is_the_lowest_gate() -> None:
    x = make(replace(BASE, count=3))
    chunks = x.means.shape[2]
    x.means[:, :, ::2] = float("nan")
    few = select(x)
    sane = replace(x, means=x.means.nan_to_num(0.0))
    lowest = sane.q @ sane.means.mT
    lowest[..., ::2] = LOWEST
    for h, video in ((0, 0), (1, 50), (0, 104)):
        own = int(x.own[video])
        best = ranked(lowest[0, h, video], [c for c in range(chunks) if c != own])[:3]
        assert few[0, h, :, video].nonzero()[:, 0].tolist() == sorted([own, *best])
    every = select(replace(x, case=replace(x.case, count=1000)))
    assert every.all()


def test_nan_has_no_share_of_the_gates() -> None:
    x = make(replace(BASE, mode="threshold"))
    x.means[:, :, 1] = float("nan")
    hidden = torch.arange(x.means.shape[2])[None] != 1
    assert torch.equal(select(x), select(replace(x, chunk_visible=hidden)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_a_share_of_what_is_no_number_ends(number: float, threshold: float) -> None:
    x = make(replace(BASE, mode="threshold", threshold=threshold))
    x.q[:, :, ::2] = number
    x.means[:, :, 1] = number
    others = select(x).sum(2) - 1
    assert (others >= 1).all()


def test_a_chunk_out_of_range_is_refused() -> None:
    x = make(BASE)
    for chunk in (-1, x.means.shape[2]):
        x.own[7] = chunk
        with pytest.raises(BlockListError, match="point outside the tensors"):
            select(x)


def test_no_query_is_no_work() -> None:
    x = make(BASE)
    empty = replace(x, q=x.q[:0], means=x.means[:0])
    assert select(empty).shape == (0, 2, len(oracle.blocks(BASE.grid, BASE.tile)), 105)


def test_only_the_native_kernel_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(BASE)
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "native")
    assert cpu.selects_per_query()
    assert torch.equal(unpack_bits(x.call(cpu.select_per_query), 105), select(x))
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "portable")
    assert not cpu.selects_per_query()
    with pytest.raises(cpu.UnknownKernelError, match="cannot select chunks for each query"):
        x.call(cpu.select_per_query)
