"""Kernels of attention over selected chunks under the interpreter, against loops in float64."""

from __future__ import annotations

from typing import NamedTuple

import helpers
import oracle
import pytest
import torch
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.kernels import attention
from compiled_sparse.kernels import chunk_attention
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.tuning import Tile
from compiled_sparse.ops.bit_masks import pack_bits

pytestmark = pytest.mark.usefixtures("poisoned_memory", "gpu_kernels_on_cpu")

SLOW_DTYPES = (torch.float32, torch.bfloat16)
SMALL_STEPS = Tile(own=16, other=16, warps=4, stages=1)


class Chunks(NamedTuple):
    """Where chunks lie."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    before: int = 0
    after: int = 0

    @property
    def blocks(self) -> list[list[int]]:
        """Tokens of every chunk."""
        return oracle.blocks(self.grid, self.tile, self.before, self.after)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.blocks))

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments of the op."""
        text = {"text_before": self.before, "text_after": self.after}
        return {"grid": self.grid, "tile": self.tile, **text}

    def tensors(
        self,
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return random q, k and v of one batch entry."""
        q, k, v = (torch.randn(1, n, self.length, head_dim) for n in (heads, kv_heads, kv_heads))
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def selection(self, heads: int = 2, density: float = 0.4) -> Tensor:
        """Return which queries selected each chunk, bool [1, heads, chunks, length]."""
        return torch.rand(1, heads, len(self.blocks), self.length) < density

    def mask(self, selection: Tensor) -> Tensor:
        """Return which keys each query sees, [1, heads, length, length]."""
        mask = torch.zeros(*selection.shape[:2], self.length, self.length, dtype=torch.bool)
        for chunk, tokens in enumerate(self.blocks):
            mask[..., tokens] = selection[:, :, chunk, :, None]
        return mask


ODD = Chunks((5, 7, 3), (2, 3, 2), before=5, after=14)
LARGE = Chunks((3, 4, 5), (2, 4, 4), after=50)
ONE_AXIS = Chunks((77,), (24,))
TWO_AXES = Chunks((7, 9), (7, 4), before=3)


def packed(selection: Tensor) -> Tensor:
    """The selection as the op takes it, with garbage in the bits behind the last query."""
    garbage = torch.ones(*selection.shape[:-1], -selection.shape[-1] % 32, dtype=torch.bool)
    return pack_bits(torch.cat([selection, garbage], -1))


def check(
    chunks: Chunks,
    tensors: tuple[Tensor, Tensor, Tensor],
    selection: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Compare output, log-sum-exp and gradients with the float64 loops."""
    words = packed(selection)

    def op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cs.ops.chunk_sparse_attention(
            q, k, v, words, key_mask=key_mask, scale=scale, **chunks.arguments()
        )

    mask = chunks.mask(selection)
    helpers.assert_matches_oracle(op, *tensors, mask, key_mask=key_mask, scale=scale, rounded=True)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program for queries take 32 of them, and one for keys 64 at a time."""
    monkeypatch.setattr(chunk_attention, "FEWEST_WORDS", 1)
    monkeypatch.setattr(chunk_attention, "LEVELS", 1)
    monkeypatch.setattr(chunk_attention, "MOST_WORDS", 2)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every kernel take 16 queries and 16 keys at a time."""
    for kernel in tuning.CHUNK_KERNELS:
        monkeypatch.setitem(tuning._demanded, kernel, SMALL_STEPS)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_DTYPES)],
    ids=str,
)
def test_text_grouped_heads_and_partial_chunks(dtype: torch.dtype) -> None:
    check(ODD, ODD.tensors(dtype=dtype), ODD.selection())


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [80, 128])
def test_other_head_sizes(head_dim: int) -> None:
    check(TWO_AXES, TWO_AXES.tensors(1, 1, head_dim, torch.float16), TWO_AXES.selection(1))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(
    "chunks", [ONE_AXIS, LARGE, pytest.param(ODD, marks=pytest.mark.slow)], ids=str
)
def test_several_segments(chunks: Chunks) -> None:
    check(chunks, chunks.tensors(1, 1, dtype=torch.float16), chunks.selection(1))


@pytest.mark.slow
@pytest.mark.usefixtures("short_segments", "small_steps")
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_several_tiles_in_a_visit(dtype: torch.dtype) -> None:
    check(LARGE, LARGE.tensors(1, 1, dtype=dtype), LARGE.selection(1, density=0.7))


def test_hidden_keys_are_as_if_they_were_not_there() -> None:
    q, k, v = TWO_AXES.tensors(dtype=torch.float16)
    selection, shown = TWO_AXES.selection(), torch.rand(1, TWO_AXES.length) < 0.7
    shown[:, TWO_AXES.blocks[2]] = False
    check(TWO_AXES, (q, k, v), selection, key_mask=shown)
    arguments = {"key_mask": shown, **TWO_AXES.arguments()}
    expected = cs.ops.chunk_sparse_attention(q, k, v, packed(selection), **arguments)
    k, v = (each.masked_fill(~shown[:, None, :, None], float("nan")) for each in (k, v))
    leaves = [each.requires_grad_() for each in (q, k, v)]
    actual = cs.ops.chunk_sparse_attention(*leaves, packed(selection), **arguments)
    assert all(map(torch.equal, actual, expected))
    gradients = torch.autograd.grad(actual[0].sum(), leaves)
    assert not any(bool(each.isnan().any()) for each in gradients)
    assert not gradients[1].mT[..., ~shown[0]].any()


def test_what_nobody_selects_and_who_selects_nothing() -> None:
    q, k, v = (each.requires_grad_() for each in ONE_AXIS.tensors())
    selection = ONE_AXIS.selection(density=1.0)
    selection[:, :, 1] = False
    selection[..., 30:50] = False
    out, lse = cs.ops.chunk_sparse_attention(q, k, v, packed(selection), **ONE_AXIS.arguments())
    gradients = torch.autograd.grad((out.sum(), lse[..., 50:].sum()), (q, k, v))
    assert not out[:, :, 30:50].any()
    assert bool((lse[:, :, 30:50] == float("-inf")).all())
    assert not gradients[0][:, :, 30:50].any()
    for each in gradients[1:]:
        assert not each[:, :, ONE_AXIS.blocks[1]].any()
        assert bool(each[:, :, ONE_AXIS.blocks[2]].any())


def test_all_chunks_are_dense_attention_and_float64_is_not_rounded() -> None:
    q, k, v = TWO_AXES.tensors(2, 2, dtype=torch.float64)
    selection = TWO_AXES.selection(density=2.0)
    out, _ = cs.ops.chunk_sparse_attention(q, k, v, packed(selection), **TWO_AXES.arguments())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_float64_are_those_of_finite_differences() -> None:
    chunks = Chunks((2, 3), (2, 2), after=2)
    leaves = [each.requires_grad_() for each in chunks.tensors(2, 1, 4, torch.float64)]
    words = packed(chunks.selection(density=0.7))

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cs.ops.chunk_sparse_attention(q, k, v, words, scale=0.3, **chunks.arguments())[0]

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(scale: float) -> None:
    check(ONE_AXIS, ONE_AXIS.tensors(1, 1), ONE_AXIS.selection(1), scale=scale)


def test_addresses_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ADDRESS_LIMIT", 1)
    check(ONE_AXIS, ONE_AXIS.tensors(dtype=torch.float16), ONE_AXIS.selection())


@pytest.mark.slow
def test_any_strides() -> None:
    q, k, v = ONE_AXIS.tensors(2, 2)
    inputs = (q.mT.contiguous().mT, k.repeat_interleave(2, dim=2)[:, :, ::2], v[:, :1].expand_as(v))
    check(ONE_AXIS, inputs, ONE_AXIS.selection())


def test_nan_in_a_query_is_handed_on() -> None:
    q, k, v = TWO_AXES.tensors(1, 1, dtype=torch.float16)
    q[0, 0, 7] = float("nan")
    words = packed(TWO_AXES.selection(1, density=1.0))
    out, lse = cs.ops.chunk_sparse_attention(q, k, v, words, **TWO_AXES.arguments())
    assert bool(lse.isnan()[0, 0, 7])
    assert bool(out[0, 0, 7].isnan().all())
    assert int(out.isnan().sum()) == 16


def test_the_same_call_gives_the_same_bits() -> None:
    leaves = [each.requires_grad_() for each in TWO_AXES.tensors(dtype=torch.float16)]
    words = packed(TWO_AXES.selection())

    def gradients() -> tuple[Tensor, ...]:
        out, _ = cs.ops.chunk_sparse_attention(*leaves, words, **TWO_AXES.arguments())
        return torch.autograd.grad(out.square().sum(), leaves)

    assert all(map(torch.equal, gradients(), gradients()))


@pytest.mark.parametrize(
    ("heads", "words", "expected"),
    [(1, 4, 8), (12, 1024, 11), (40, 2363, 64), (4000, 4, 15)],
    ids=["few", "Wan 1.3B", "Wan 14B", "many heads"],
)
def test_segments_fill_the_chip_before_they_grow(heads: int, words: int, expected: int) -> None:
    q = torch.empty(1, heads, 0, 64)
    selected = torch.empty(1, heads, 0, words, dtype=torch.int32)
    sides = (1, 1, 1)
    call = chunk_attention.ChunkCall(q, q, q, selected, None, sides, sides, (0, 0), 1.0)
    assert chunk_attention._segment_words(call) == expected
