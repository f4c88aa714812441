"""Attention masks in every form models write them, made of a boolean one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from modules import LENGTH
from modules import Tiny
from modules import raster
from torch import Tensor

Build = Callable[[Tensor], Tensor]


def with_mask(build: Build) -> Tiny:
    """Return a model that makes its attention mask of one that it is given."""
    return Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=build(mask)))


def prompt_mask(batch: int = 2) -> Tensor:
    """Return a random boolean [batch, length]; no query is far from a key it may see."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(batch, LENGTH, generator=generator) > 0.3
    mask[:, -4:] = False
    return mask


def outer(m: Tensor) -> Tensor:
    rows = m.view(m.shape[0], 1, 1, -1).repeat(1, 1, m.shape[1], 1)
    return (rows & rows.transpose(2, 3)).bool()


def _written(m: Tensor) -> Tensor:
    mask = torch.zeros(m.shape, dtype=torch.bool)
    for i, length in enumerate((41, 56)):
        mask[i, :length] = True
    return mask[:, None, None] & m[:, None, None]


def _lengths(m: Tensor) -> Tensor:
    lengths = m.sum(1, dtype=torch.int)
    hidden = torch.arange(LENGTH)[None] >= lengths[:, None]
    return torch.ones(m.shape, dtype=torch.bool).masked_fill(hidden, False)[:, None, None]


def _of_heads(m: Tensor) -> Tensor:
    """The additive mask as `prepare_attention_mask` spreads it over the heads."""
    bias = (1 - m.float()).mul(-10000.0).unsqueeze(1)
    return bias.repeat_interleave(2, dim=0, output_size=4).view(2, 2, -1, LENGTH)


def _joined(m: Tensor) -> Tensor:
    ones = torch.ones((m.shape[0], 40), dtype=torch.bool)
    return torch.cat([ones, m[:, 40:]], dim=1)[:, None, None, :]


KEY_PADDING: dict[str, Build] = {
    "four dimensions": lambda m: m[:, None, None, :],
    "unsqueezed": lambda m: m.unsqueeze(1).unsqueeze(1),
    "viewed": lambda m: m.view(2, 1, 1, -1),
    "double negation": lambda m: ~(~m)[:, None, None],
    "expanded over queries": lambda m: m[:, None, None].expand(-1, 1, LENGTH, -1),
    "expanded over all": lambda m: m[:, None, None].expand(2, 2, LENGTH, LENGTH),
    "repeated over queries": lambda m: m.view(2, 1, 1, -1).repeat(1, 1, LENGTH, 1),
    "transposed twice": lambda m: m[:, None, :, None].transpose(2, 3).contiguous(),
    "integers made bool": lambda m: m.long().add(0).bool()[:, None, None],
    "two conditions": lambda m: (m & (torch.arange(LENGTH) != 17))[:, None, None],
    "either of two": lambda m: (m | (torch.arange(LENGTH) % 7 == 3))[:, None, None],
    "shared by the batch": lambda m: m[:1, None, None],
    "one row": lambda m: m[:1],
    "padded": lambda m: F.pad(m[:, 50:], (50, 0), value=True)[:, None, None],
    "joined": _joined,
    "lengths": _lengths,
    "written per sample": _written,
    "times -10000": lambda m: ((1 - m.float()) * -10000.0)[:, None, None],
    "smallest number": lambda m: ((1 - m.float()) * torch.finfo(torch.float32).min)[:, None, None],
    "filled with -inf": lambda m: torch.zeros(m.shape).masked_fill(~m, float("-inf"))[
        :, None, None
    ],
    "filled in place": lambda m: torch.zeros(m.shape).masked_fill_(~m, float("-inf"))[
        :, None, None
    ],
    "where": lambda m: torch.where(m, 0.0, float("-inf"))[:, None, None],
    "logarithm": lambda m: m.float().log()[:, None, None],
    "additive, expanded": lambda m: torch.where(m, 0.0, -1e5)[:, None, None].expand(
        2, 2, LENGTH, LENGTH
    ),
    "additive, per head": _of_heads,
    "additive, joined": lambda m: torch.cat(
        [torch.zeros(2, 40), (1 - m[:, 40:].float()) * -10000.0], 1
    )[:, None, None],
}

OUTER: dict[str, Build] = {
    "view and repeat": outer,
    "and": lambda m: (m.unsqueeze(-1) & m.unsqueeze(-2)).unsqueeze(1),
    "product of bools": lambda m: m[:, None, :, None] * m[:, None, None, :],
    "product of numbers": lambda m: (m[:, None, :, None].float() * m[:, None, None, :].float()) > 0,
    "minus infinity": lambda m: torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(
        ~outer(m), float("-inf")
    ),
    "two vectors": lambda m: (m.flip(1).unsqueeze(-1) & m.unsqueeze(-2)).unsqueeze(1),
}
