"""What a builder is, and what the builders of all families share."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

TEXT_LENGTH = 7
HIDDEN_TEXT = 2
HEAD_DIM = 16
HEADS = 2
GRID = (3, 4, 5)
IMAGE = (6, 7)

Inputs = dict[str, Any]
Grid = tuple[int, ...]


class Case(NamedTuple):
    """A model with random weights and the keyword arguments of one call."""

    model: nn.Module
    inputs: Inputs


@dataclass(frozen=True)
class Truth:
    """What the tokens of one attention call are, read off the model's code.

    Args:
        kind: "video": one whole grid, each token once, with `before` and `after` other tokens
            around it. Else what it is instead: "cross", "text" (tokens that are no video, among
            themselves), "partial" (some axes of the grid only), "several" (more than one grid, or
            tokens of it that are missing or repeated).
        before: Tokens in front of the video.
        after: Tokens behind it.
    """

    kind: str
    before: int = 0
    after: int = 0


def video(before: int = 0, after: int = 0) -> Truth:
    """Attention over the whole grid, with other tokens around it."""
    return Truth("video", before, after)


VIDEO = video()
CROSS = Truth("cross")
TEXT = Truth("text")
PARTIAL = Truth("partial")
SEVERAL = Truth("several")

Sites = tuple[Truth, ...]


@dataclass(frozen=True)
class Builder:
    """How to make one model small, and the truth about its attention calls.

    Args:
        name: Unique name.
        family: Heading in tables.
        model: Name of the diffusers class.
        build: `build(grid, batch)` gives the model and its inputs.
        sites: Every call of `scaled_dot_product_attention` in the order of execution, as
            `sites(grid, batch)`.
        grid: A grid of odd sizes that the model takes; its length is the number of axes.
        axes: Dimensions of `inputs[video]` that are cut into the grid; none where the caller hands
            over tokens.
        video: Name of the input that holds the video or image.
    """

    name: str
    family: str
    model: str
    build: Callable[..., Case] = field(repr=False)
    sites: Callable[[Grid, int], Sites] = field(repr=False)
    grid: Grid
    axes: tuple[int, ...]
    video: str


BUILDERS: dict[str, Builder] = {}


def builder(
    name: str,
    family: str,
    model: str,
    sites: Sites | Callable[[Grid, int], Sites],
    *,
    grid: Grid = GRID,
    axes: tuple[int, ...] | None = None,
    video: str = "hidden_states",
) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a function `build(grid, batch=1)`; see `Builder` for the arguments."""

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        assert name not in BUILDERS, name
        at = sites if callable(sites) else lambda *_: sites
        cut = tuple(range(2, 2 + len(grid))) if axes is None else axes
        BUILDERS[name] = Builder(name, family, model, build, at, grid, cut, video)
        return build

    return register


def randomized(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Give every parameter a value, also those that start at zero and would hide an error.

    Norm scales stay near one, so that deep stacks neither explode nor die out.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name and name.endswith("weight") and parameter.dim() == 1:
                parameter.add_(1.0)
    return model.eval()


def latents(grid: Grid, channels: int, patch: int, batch: int) -> Tensor:
    """Return a random video [batch, channels, T, H * patch, W * patch]."""
    frames, height, width = grid
    return torch.randn(batch, channels, frames, height * patch, width * patch)


def frames_first(grid: Grid, channels: int, patch: int, batch: int) -> Tensor:
    """Return a random video [batch, T, channels, H * patch, W * patch]."""
    frames, height, width = grid
    return torch.randn(batch, frames, channels, height * patch, width * patch)


def image(grid: Grid, channels: int, patch: int, batch: int) -> Tensor:
    """Return a random image [batch, channels, H * patch, W * patch]."""
    height, width = grid
    return torch.randn(batch, channels, height * patch, width * patch)


def tokens(grid: Grid, channels: int, batch: int) -> Tensor:
    """Return a packed video or image [batch, tokens, channels]."""
    return torch.randn(batch, torch.Size(grid).numel(), channels)


def text(batch: int, channels: int = 16, length: int = TEXT_LENGTH) -> Tensor:
    """Return random text embeddings [batch, length, channels]."""
    return torch.randn(batch, length, channels)


def prompt_mask(batch: int, length: int = TEXT_LENGTH) -> Tensor:
    """Return 1 for text and 0 for padding [batch, length]; each prompt has a length of its own."""
    valid = torch.tensor([length - HIDDEN_TEXT - i for i in range(batch)])
    return (torch.arange(length) < valid[:, None]).float()


def steps(batch: int, step: float = 500.0) -> Tensor:
    """Return the same timestep for each sample."""
    return torch.full((batch,), step)


def grid_ids(grid: Grid) -> Tensor:
    """Return the indices of each token [tokens, axes], in raster order."""
    axes = torch.meshgrid(*(torch.arange(extent).float() for extent in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=1)


def rotary(grid: Grid, head_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [tokens, head_dim] that turn by the token's place in the grid."""
    places = grid_ids(grid)
    rates = torch.linspace(0.3, 1.0, head_dim // 2)
    which = torch.arange(head_dim // 2) % places.shape[1]
    angles = (places[:, which] * rates).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
