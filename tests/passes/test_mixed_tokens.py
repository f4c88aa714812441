"""Tokens blended with others in another order, of another batch member, or summed by a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import LENGTH
from modules import Attention
from modules import Tiny
from modules import assert_rewritten
from modules import assert_untouched
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ORDER = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
PRODUCT = torch.eye(LENGTH)[ORDER]
HALF = (torch.arange(LENGTH)[:, None] < LENGTH // 2).float()

Move = Callable[[Tensor], Tensor]


def _refused(model: Any, *inputs: Tensor) -> None:
    assert_untouched(model, *inputs, reason="layout_unknown")


BLENDS: dict[str, Move] = {
    "flipped": lambda x: x * HALF + x.flip(1) * (1 - HALF),
    "rolled": lambda x: x * 0 + x.roll(5, 1),
    "indexed": lambda x: x * HALF + x[:, ORDER] * (1 - HALF),
    "selected": lambda x: torch.maximum(x, x.index_select(1, ORDER)),
    "gathered": lambda x: torch.lerp(x, x.gather(1, ORDER[None, :, None].expand_as(x)), 1.0),
    "twice": lambda x: x + (x + x.flip(1)).tanh() * HALF,
    "added in place": lambda x: x.clone().mul_(0).add_(x.roll(1, 1)),
}


@pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS)
def test_tokens_blended_with_themselves_in_another_order_are_refused(blend: Move) -> None:
    _refused(Tiny(lambda m, x: m.attn(blend(raster(x)))).requires_grad_(False), video())


def test_axes_swapped_and_added_in_place_are_refused() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x = x.clone()
        x += x.transpose(3, 4).clone()
        return m.attn(raster(x))

    _refused(Tiny(body).requires_grad_(False), video(grid=(3, 4, 4)))


def test_channels_in_reverse_keep_the_layout() -> None:
    assert_rewritten(Tiny(lambda m, x: m.attn(raster(x) + raster(x).flip(-1))), video())


SUMS: dict[str, Move] = {
    "matrix": lambda x: PRODUCT @ x[0],
    "linear": lambda x: F.linear(PRODUCT, x[0].t()),
    "one-hot": lambda x: (PRODUCT[:, :, None] * x).sum(1),
}


@pytest.mark.parametrize("moved", SUMS.values(), ids=SUMS)
def test_tokens_moved_by_a_constant_matrix_do_not_pass_for_constants(moved: Move) -> None:
    def chosen(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x)
        return m.attn(torch.where(HALF.bool(), x, moved(x)))

    def written(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x).clone()
        x[0] = moved(x)
        return m.attn(x)

    _refused(Tiny(chosen).requires_grad_(False), video())
    _refused(Tiny(written).requires_grad_(False), video())


@pytest.mark.parametrize(
    "move",
    [lambda x: x[:, :, [2, 0, 1]], lambda x: x.roll(1, 3), lambda x: x.flip(4)],
    ids=["frames", "rolled", "mirrored"],
)
def test_a_convolution_over_moved_tokens_starts_no_grid(move: Move) -> None:
    class Projected(Tiny):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.attn(raster(m.qkv(move(x)))))
            self.qkv = torch.nn.Conv3d(16, 16, 1)

    _refused(Projected().requires_grad_(False), video())


# Members of a batch.

OTHER_MEMBERS: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "chunks": lambda attn, x: attn(*x.chunk(2, 0)),
    "slices": lambda attn, x: attn(x[:1], x[1:]),
    "indices": lambda attn, x: attn(x.unflatten(0, (1, 2))[:, 0], x.unflatten(0, (1, 2))[:, 1]),
    "first for all": lambda attn, x: attn(x, x[:1].expand_as(x)),
    "rolled": lambda attn, x: attn(x, torch.cat([x[1:], x[:1]])),
    "flipped": lambda attn, x: attn(x, x.flip(0)),
    "slices of flipped": lambda attn, x: attn(x.flip(0)[:1], x.flip(0)[1:]),
    "slices of rolled": lambda attn, x: attn(*x.roll(1, 0).split(1)),
}


@pytest.mark.parametrize("attend", OTHER_MEMBERS.values(), ids=OTHER_MEMBERS)
def test_keys_of_another_member_of_the_batch_are_no_self_attention(attend: Any) -> None:
    _refused(Tiny(lambda m, x: attend(m.attn, raster(x))).requires_grad_(False), video(2))
    attn = Attention().requires_grad_(False)
    backend, _ = record(lambda x: attend(attn, x), tokens(2), grid_thw=GRID)
    assert backend.outcomes == ["layout_unknown"]


@pytest.mark.parametrize(
    "pick",
    [lambda x: x[1:], lambda x: x.chunk(2)[0], lambda x: x[0][None]],
    ids=["slice", "chunk", "index"],
)
def test_one_member_of_a_batch_attends_to_itself(pick: Move) -> None:
    assert_rewritten(Tiny(lambda m, x: m.attn(pick(raster(x)))).requires_grad_(False), video(2))


# A grid that the caller names beside a patch embedding.


@pytest.mark.parametrize(
    "move", [lambda x: x.roll(5, 1), lambda x: x[:, ORDER]], ids=["rolled", "indexed"]
)
def test_a_named_grid_does_not_cover_tokens_that_were_moved(move: Move) -> None:
    model = Tiny(lambda m, x: m.attn(raster(x)) + m.attn(move(raster(x)))).requires_grad_(False)
    backend, _ = record(model, video(), grid_thw=GRID)
    assert backend.outcomes == ["sparse", "layout_unknown"]


def test_a_named_grid_is_not_for_two_orders_of_one_video() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        return m.attn(raster(x)) + m.attn(x.permute(0, 3, 4, 2, 1).flatten(1, 3))

    backend, _ = record(Tiny(body).requires_grad_(False), video(), grid_thw=GRID)
    assert backend.outcomes == ["layout_unknown"] * 2
