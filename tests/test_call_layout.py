"""Grids read from the call of a model: what is read, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

from compiled_sparse.call_layout import read_grid


class Model(nn.Module):
    """A call signature with all that any reader looks at."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        num_frames: Any = None,
        height: Any = None,
        width: Any = None,
        img_ids: Any = None,
        img_shapes: Any = None,
    ) -> None:
        """Do nothing."""


def latents(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("config", "shape", "grid"),
    [
        ({"patch_size": (1, 2, 2)}, (2, 16, 21, 60, 104), (21, 30, 52)),  # Wan
        ({"patch_size": 2, "patch_size_t": 1}, (1, 16, 9, 40, 64), (9, 20, 32)),  # HunyuanVideo
        ({"patch_size": 2, "patch_size_t": None}, (1, 13, 16, 60, 90), (13, 30, 45)),  # CogVideoX
        ({"patch_size": 2, "patch_size_t": 2}, (1, 12, 16, 60, 90), (6, 30, 45)),  # CogVideoX 1.5
        ({"patch_size": 2}, (1, 16, 7, 60, 106), (7, 30, 53)),  # Mochi
        ({"patch_size": (1, 2, 2)}, (1, 5, 32, 48, 16), (5, 16, 24)),  # Kandinsky, channels last
        ({"patch_size": (1, 2, 2)}, (1, 16, 16, 60, 104), (16, 30, 52)),  # frames like channels
        ({"patch_size": 2}, (2, 16, 64, 96), (32, 48)),  # an image
    ],
    ids=str,
)
def test_latents_and_patch_sizes_give_the_grid(
    config: dict[str, Any], shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    model = Model(in_channels=16, **config)
    assert read_grid(model, (latents(*shape),), {}) == grid
    assert read_grid(model, (), {"hidden_states": latents(*shape), "timestep": 3}) == grid


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"patch_size": (1, 2, 2)}, (1, 16, 21, 60, 16)),  # which are channels, which is width?
        ({"patch_size": (1, 2, 2)}, (1, 12, 21, 60, 104)),  # no channels
        ({"patch_size": (1, 2, 2)}, (1, 16, 21, 61, 104)),  # not whole patches
        ({"patch_size": 2, "patch_size_t": 2}, (1, 16, 21, 60, 104)),
        ({"patch_size": (2, 2)}, (1, 16, 21, 60, 104)),
        ({}, (1, 16, 21, 60, 104)),
        ({"patch_size": 2}, (1, 100, 16)),
        ({"patch_size": 2}, (2, 8, 64, 96)),
    ],
    ids=str,
)
def test_what_can_be_read_in_two_ways_or_does_not_fit_is_refused(
    config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    assert read_grid(Model(in_channels=16, **config), (latents(*shape),), {}) is None


def test_a_model_without_a_config_says_nothing() -> None:
    model = nn.Linear(3, 3)
    assert read_grid(model, (latents(1, 16, 2, 4, 4),), {}) is None


def test_a_call_that_does_not_fit_the_signature_says_nothing() -> None:
    model = Model(in_channels=16, patch_size=2)
    assert read_grid(model, (), {"no_such_argument": 1}) is None


def test_sizes_beside_packed_tokens_are_the_grid_if_they_multiply_up() -> None:
    tokens, model = latents(1, 60, 128), Model()
    sizes = {"num_frames": 3, "height": 4, "width": 5}
    assert read_grid(model, (tokens,), sizes) == (3, 4, 5)
    assert read_grid(model, (tokens,), {**sizes, "width": 6}) is None
    assert read_grid(model, (tokens,), {**sizes, "width": None}) is None
    assert read_grid(model, (tokens,), {**sizes, "width": 5.0}) is None


def test_image_shapes_are_the_grid_if_all_samples_have_the_same_one() -> None:
    tokens, model = latents(2, 24, 64), Model()

    def read(shapes: Any) -> Any:
        return read_grid(model, (tokens,), {"img_shapes": shapes})

    assert read([[(1, 4, 6)], [(1, 4, 6)]]) == (1, 4, 6)
    assert read([(1, 4, 6), (1, 4, 6)]) == (1, 4, 6)
    assert read([[(1, 4, 6)], [(1, 6, 4)]]) is None
    assert read([[(1, 4, 3), (1, 4, 3)]] * 2) is None
    assert read([[(1, 4, 5)]] * 2) is None
    assert read([]) is None


def image_ids(height: int, width: int) -> Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.flatten(0, 1)


def test_image_ids_are_a_grid_if_they_run_in_raster_order() -> None:
    tokens, model, ids = latents(1, 24, 64), Model(), image_ids(4, 6)

    def read(ids: Tensor) -> Any:
        return read_grid(model, (tokens,), {"img_ids": ids})

    assert read(ids) == (4, 6)
    assert read(ids[None]) == (4, 6)
    assert read(ids.flip(0)) is None
    assert read(ids[:-1]) is None
    assert read(ids[:, [0, 2, 1]]) is None
    two_images = torch.cat([ids, ids + torch.tensor([1, 0, 0])])
    assert read(two_images) is None
    assert read(ids[:, :2]) is None
    assert read(ids[:0]) is None
