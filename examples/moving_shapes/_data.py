"""Synthetic videos: discs and squares that move, bounce off the walls and hide each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 6, 26, 26
CHANNELS = 3
SHAPES = 2
_RADII = (2.5, 5.0)
_TOP_SPEED = 5.0  # pixels a frame: in six frames a shape crosses the picture
_STEP = 2  # shapes move by whole patches
_REACH = 6  # pixels from the centre of the largest shape to its edge
_BRIGHTNESS, _TEXTURE = 2.0, 1.5  # of a shape's mean colour, and of its pixels around it


@dataclass(frozen=True)
class Batch:
    """A batch of a training step.

    Args:
        clean: The videos [batch, channels, frames, height, width].
        noise: Noise of the same shape.
        time: How much of the noise is mixed in, from 0 to 1 [batch].
    """

    clean: Tensor
    noise: Tensor
    time: Tensor


def batches(size: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end; the same seed gives the same ones.

    Args:
        size: Videos in a batch.
        seed: Where the random numbers start.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        clean = videos(size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        yield Batch(clean, noise, torch.rand(size, generator=generator))


def held_out(size: int, count: int, seed: int) -> list[Batch]:
    """Return batches to evaluate on; their times are spread evenly from 0 to 1.

    Args:
        size: Videos in a batch.
        count: Number of batches.
        seed: Where the random numbers start.
    """
    source = batches(size, seed)
    fixed = [next(source) for _ in range(count)]
    times = (torch.arange(size * count) + 0.5) / (size * count)
    shuffled = times[torch.randperm(len(times), generator=torch.Generator().manual_seed(seed))]
    return [
        Batch(batch.clean, batch.noise, time)
        for batch, time in zip(fixed, shuffled.split(size), strict=True)
    ]


def videos(size: int, generator: torch.Generator) -> Tensor:
    """Return videos of moving shapes [size, 3, 6, 26, 26].

    Each shape has a surface, a radius, a place and a velocity of its own; half of them are discs.

    Args:
        size: Number of videos.
        generator: The source of all randomness.
    """
    shape = (size, SHAPES)
    radius = _uniform(shape, *_RADII, generator)
    velocity = _uniform((*shape, 2), -_TOP_SPEED, _TOP_SPEED, generator)
    start = torch.rand((*shape, 2), generator=generator)
    colour = _uniform((*shape, CHANNELS, 1, 1), -_BRIGHTNESS, _BRIGHTNESS, generator)
    side = 2 * _REACH + 1
    texture = _TEXTURE * torch.randn((*shape, CHANNELS, side, side), generator=generator)
    is_disc = torch.rand(shape, generator=generator) < 0.5
    places = _bounced(start, velocity, radius)
    result = torch.zeros(size, CHANNELS, FRAMES, HEIGHT, WIDTH)
    for each in range(SHAPES):  # later shapes are in front
        rows, columns = _distances(places[:, each])
        cover = _cover(rows, columns, radius[:, each], is_disc[:, each])[:, None]
        surface = _surface(rows, columns, (colour + texture)[:, each])
        result = torch.lerp(result, surface, cover)
    return result


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _bounced(start: Tensor, velocity: Tensor, radius: Tensor) -> Tensor:
    """Return centres [videos, shapes, frames, 2]: straight lines, folded at walls, then rounded."""
    room = torch.tensor([HEIGHT, WIDTH]) - 1 - 2 * radius[..., None]
    frames = torch.arange(FRAMES)[:, None]
    straight = (start * room)[:, :, None] + velocity[:, :, None] * frames
    period = 2 * room[:, :, None]
    folded = straight.remainder(period)
    places = torch.minimum(folded, period - folded) + radius[..., None, None]
    return _STEP * (places / _STEP).round()


def _distances(centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how many rows and columns pixels are off a shape's centre, by video and frame."""
    rows = torch.arange(HEIGHT)[:, None] - centre[..., 0, None, None]
    columns = torch.arange(WIDTH) - centre[..., 1, None, None]
    return rows, columns


def _cover(rows: Tensor, columns: Tensor, radius: Tensor, is_disc: Tensor) -> Tensor:
    """Return how much of each pixel one shape covers [videos, frames, height, width]."""
    round_distance = (rows.square() + columns.square()).sqrt()
    square_distance = torch.maximum(rows.abs(), columns.abs())
    distance = torch.where(is_disc[:, None, None, None], round_distance, square_distance)
    return (radius[:, None, None, None] + 0.5 - distance).clamp(0, 1)


def _surface(rows: Tensor, columns: Tensor, picture: Tensor) -> Tensor:
    """Return a picture that moves with its shape [videos, channels, frames, height, width]."""
    row, column = ((each + _REACH).clamp(0, 2 * _REACH).long() for each in (rows, columns))
    places = (row * picture.shape[-1] + column).flatten(1)
    colours = picture.flatten(2).gather(2, places[:, None].expand(-1, CHANNELS, -1))
    return colours.unflatten(2, (FRAMES, HEIGHT, WIDTH))
