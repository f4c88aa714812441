"""Graphs in which tokens are moved: no layout may be claimed that is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import GRID
from modules import LENGTH
from modules import Attention
from modules import RecordingBackend
from modules import Tiny
from modules import assert_close
from modules import assert_rewritten
from modules import assert_untouched
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor

ORDER = torch.randperm(LENGTH).tolist()
PERMUTATION = torch.tensor(ORDER)


def _out_argument(x: Tensor) -> Tensor:
    x = x.contiguous()
    torch.mul(x.flip(1), 1.0, out=x)
    return x


def _written_by_pieces(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, : LENGTH // 2] = x[:, LENGTH // 2 :]
    out[:, LENGTH // 2 :] = x[:, : LENGTH // 2]
    return out


def _written_by_members_of_a_batch(x: Tensor) -> Tensor:
    out = x.new_empty(2, *x.shape[1:])
    out[0] = x[0]
    out[1] = x[0].flip(0)
    return out[:1]


def _written_token_by_token(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for i, j in enumerate(ORDER):
        out[:, i] = x[:, j]
    return out


def _written_through_a_view(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    view = out.view(x.shape)
    view[:] = x.flip(1)
    return out


def _overwritten_through_a_view(x: Tensor) -> Tensor:
    x = x.contiguous()
    view = x.view(x.shape)
    view[:] = x.flip(1)
    return x


def _viewed_before_written(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    view = out.view(x.shape)
    out[:] = x.flip(1)
    return view


def _copied_into(x: Tensor) -> Tensor:
    x = x.contiguous()
    x.copy_(x.flip(1))
    return x


def _index_put(x: Tensor) -> Tensor:
    return x.clone().index_put_((torch.zeros(1, dtype=torch.long), PERMUTATION), x[0])


def _copied_into_a_part(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, : LENGTH // 2].copy_(x[:, LENGTH // 2 :])
    return x


def _in_place_sum(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    alias = out.view(x.shape)
    out += x.flip(1)
    return alias


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "index": lambda x: x[:, PERMUTATION],
    "index_select": lambda x: x.index_select(1, PERMUTATION),
    "gather": lambda x: x.gather(1, PERMUTATION[None, :, None].expand_as(x)),
    "take_along_dim": lambda x: x.take_along_dim(PERMUTATION[None, :, None], 1),
    "sort": lambda x: x.sort(dim=1).values,
    "argsort": lambda x: x[:, x[0, :, 0].argsort()],
    "topk": lambda x: x.topk(LENGTH, dim=1).values,
    "matrix": lambda x: torch.eye(LENGTH)[PERMUTATION] @ x,
    "einsum": lambda x: torch.einsum("ij,bjc->bic", torch.eye(LENGTH)[PERMUTATION], x),
    "strided halves": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "swapped halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "swapped slices": lambda x: torch.cat([x[:, 30:], x[:, :30]], 1),
    "split and swapped": lambda x: torch.cat(x.split((20, 40), 1)[::-1], 1),
    "unbound backwards": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "as_strided": lambda x: x.contiguous().as_strided(x.shape, (960, 1, 60)),
    "transposed view": lambda x: x.view(1, 12, 5, 16).transpose(1, 2).flatten(1, 2),
    "deinterleaved": lambda x: x.view(1, 30, 2, 16).transpose(1, 2).flatten(1, 2),
    "mixed with channels": lambda x: x.transpose(1, 2).reshape(x.shape),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, PERMUTATION[None, :, None].expand_as(x), x),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(1, PERMUTATION, x),
    "a batch of two orders": lambda x: torch.cat([x, x.flip(1)])[:1],
    "heads of two orders": lambda x: torch.cat(
        [x[..., None, :8], x[..., None, 8:].flip(1)], 2
    ).flatten(2),
    "channels of two orders": lambda x: torch.cat([x[..., :8], x[..., 8:].flip(1)], -1),
    "stack of two orders": lambda x: torch.stack([x, x.flip(1)])[0],
    "chosen by a mask": lambda x: torch.where(torch.arange(LENGTH)[:, None] < 9, x, x.flip(1)),
    "chosen by a mask, without a batch": lambda x: x.where(x > 0, x[0].flip(0)),
    "unfold": lambda x: x.unfold(1, 2, 2).permute(0, 3, 1, 2).flatten(1, 2),
}

WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "out=": _out_argument,
    "written by pieces": _written_by_pieces,
    "written by members of a batch": _written_by_members_of_a_batch,
    "written token by token": _written_token_by_token,
    "written through a view": _written_through_a_view,
    "overwritten through a view": _overwritten_through_a_view,
    "viewed before written": _viewed_before_written,
    "copy_": _copied_into,
    "copy_ into a part": _copied_into_a_part,
    "index_put_": _index_put,
    "sum in place": _in_place_sum,
}
"""Moves that write into a tensor, so that the analysis may end at the first of them."""


def _moved(m: Tiny, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    return m.attn(move(x))


def _moved_with_positions(m: Tiny, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    return m.attn(move(x) + m.position)


def _keys_moved(m: Tiny, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    return m.attn(x, move(x.clone()))


USES = (_moved, _moved_with_positions, _keys_moved)


def _outcomes_by_move(backend: RecordingBackend) -> dict[str, str]:
    return dict(zip(MOVES, backend.outcomes, strict=True))


@pytest.mark.parametrize("use", USES)
def test_moved_tokens_are_not_taken_for_raster_order(use: Callable[..., Tensor]) -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        return sum(use(m, raster(x), move) for move in MOVES.values())

    model, x = Tiny(body).requires_grad_(False), video()
    backend, actual = record(model, x)
    assert _outcomes_by_move(backend) == dict.fromkeys(MOVES, "layout_unknown")
    assert_close(actual, model(x))


def test_metadata_does_not_cover_keys_moved_against_their_queries() -> None:
    attn = Attention().requires_grad_(False)

    def model(x: Tensor) -> Tensor:
        return sum(attn(x, move(x.clone())) for move in MOVES.values())

    x = tokens()
    backend, actual = record(model, x, grid_thw=GRID)
    assert _outcomes_by_move(backend) == dict.fromkeys(MOVES, "layout_unknown")
    assert_close(actual, model(x))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("move", WRITES.values(), ids=WRITES)
def test_tokens_moved_by_a_write_are_not_taken_for_raster_order(
    move: Callable[[Tensor], Tensor], use: Callable[..., Tensor]
) -> None:
    model = Tiny(lambda m, x: use(m, raster(x), move)).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


@pytest.mark.parametrize("move", WRITES.values(), ids=WRITES)
def test_metadata_does_not_cover_keys_moved_by_a_write(move: Callable[[Tensor], Tensor]) -> None:
    attn = Attention().requires_grad_(False)

    def model(x: Tensor) -> Tensor:
        return attn(x, move(x.clone()))

    assert_untouched(model, tokens(), reason="layout_unknown", grid_thw=GRID)


@pytest.mark.parametrize("move", [MOVES["roll"], MOVES["transposed view"], WRITES["copy_"]])
def test_a_sparse_call_before_the_move_stays_right(move: Callable[[Tensor], Tensor]) -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x)
        x = x + m.attn(x)
        return x + m.attn(move(x.clone()))

    model = Tiny(body).requires_grad_(False)
    backend, _ = record(model, video())
    assert backend.outcomes == ["sparse", "layout_unknown"]


def test_tokens_moved_back_and_added_to_themselves_are_raster_order_again() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x)
        x = x + x.flip(1).tanh().flip(1)
        return m.attn(x)

    assert_rewritten(Tiny(body), video())


def test_a_shape_changed_in_place_later_does_not_change_the_grid_of_earlier_calls() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        out = m.attn(raster(x))
        x.transpose_(3, 4)
        return out + x.sum()

    model = Tiny(body).requires_grad_(False)
    backend = assert_untouched(model, video(), reason="layout_unknown")
    assert backend.decisions[0].detail == "tensor written in place by 'transpose_'"


def test_a_write_inside_activation_checkpointing_is_seen_outside() -> None:
    def reverse(x: Tensor) -> Tensor:
        x[:] = x.flip(1)
        return x.sum()

    def body(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x).clone()
        total = torch.utils.checkpoint.checkpoint(reverse, x, use_reentrant=False)
        return m.attn(x) + total

    model = Tiny(body).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


class Reverse(torch.autograd.Function):
    """Move tokens in a function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Reverse the tokens."""
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Reverse them back."""
        return grad.flip(1)


def test_a_custom_autograd_function_is_not_looked_into() -> None:
    model = Tiny(lambda m, x: m.attn(Reverse.apply(raster(x))))
    assert_untouched(model, video(), reason="layout_unknown")
