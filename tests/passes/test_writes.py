"""Writes that a graph hardly shows: through numpy, in nested graphs, under another name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modules import Tiny
from modules import assert_rewritten
from modules import assert_untouched
from modules import raster
from modules import video
from torch import Tensor

Write = Callable[[Tensor], Any]

BACKWARDS = np.arange(59, -1, -1)


def _after(write: Write) -> Tiny:
    """Return a model that attends to tokens after something was done to them."""

    def body(m: Tiny, x: Tensor) -> Tensor:
        tokens = raster(x).clone()
        write(tokens)
        return m.attn(tokens)

    return Tiny(body)


def _swap_halves(tokens: Tensor) -> None:
    array = np.asarray(tokens)
    array[:, :30], array[:, 30:] = array[:, 30:].copy(), array[:, :30].copy()


THROUGH_NUMPY: dict[str, Write] = {
    "items": lambda y: y.numpy().__setitem__(slice(None), np.flip(y.numpy(), 1).copy()),
    "sort": lambda y: y.numpy().sort(axis=1),
    "function": lambda y: np.put_along_axis(
        y.numpy(), BACKWARDS[None, :, None], y.numpy().copy(), 1
    ),
    "operator": lambda y: y.numpy().__imul__(np.sign(y.numpy())),
    "other view": _swap_halves,
}


@pytest.mark.parametrize("write", THROUGH_NUMPY.values(), ids=THROUGH_NUMPY)
def test_a_write_through_a_numpy_view_is_seen(write: Write) -> None:
    assert_untouched(_after(write).requires_grad_(False), video(), reason="layout_unknown")


class Reversing(torch.autograd.Function):
    """Writes to its input without marking it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Reverse the tokens in place."""
        x.copy_(x.flip(1))
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return some gradient."""
        return gradients[0].expand(1, 60, 16)


def test_a_write_inside_an_autograd_function_is_seen() -> None:
    assert_untouched(_after(Reversing.apply), video(), reason="layout_unknown")


@torch._dynamo.nonstrict_trace
def _reverse_untraced(tokens: Tensor) -> Tensor:
    tokens.copy_(tokens.flip(1))
    return tokens.sum()


def test_what_runs_untraced_may_write() -> None:
    model = _after(_reverse_untraced).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


def test_a_branch_that_writes_nothing_keeps_the_layout() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        tokens = raster(x).clone()
        changed = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 2, (tokens,))
        return m.attn(tokens) + changed.mean()

    assert_rewritten(Tiny(body).requires_grad_(False), video())
