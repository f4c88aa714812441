"""The token grid read from a call of a whole model: one small reader per call signature.

A reader refuses rather than guesses: where sizes do not agree, or two readings are possible, there
is no grid.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import nn

Grid = tuple[int, ...]
Reader = Callable[[nn.Module, Mapping[str, Any]], "Grid | None"]

_CHANNEL_DIMS = (1, 2, 4)
"""Where video latents hold their channels: [B, C, T, H, W], [B, T, C, H, W] or [B, T, H, W, C]."""


def read_grid(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid | None:
    """Return the token grid of a call of a model, or None where it does not say.

    Args:
        module: The model.
        args: Positional arguments of its `forward`.
        kwargs: Keyword arguments.
    """
    cls: Any = type(module)
    try:
        bound = _signature(cls).bind_partial(module, *args, **kwargs)
    except TypeError:  # the call itself will say what is wrong with it
        return None
    for reader in READERS:
        grid = reader(module, bound.arguments)
        if grid is not None:
            return grid
    return None


def sizes_in_call(module: nn.Module, call: Mapping[str, Any]) -> Grid | None:
    """LTX: `num_frames`, `height` and `width` beside packed tokens."""
    sizes = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    return _fitting(sizes, call)


def image_shapes(module: nn.Module, call: Mapping[str, Any]) -> Grid | None:
    """QwenImage: `img_shapes`, per sample a list of (frames, height, width) of its images."""
    shapes = call.get("img_shapes")
    if not isinstance(shapes, list) or not shapes:
        return None
    samples = [shape if isinstance(shape, list) else [shape] for shape in shapes]
    first = samples[0]
    if len(first) != 1 or any(sample != first for sample in samples):
        return None
    return _fitting(tuple(first[0]), call)


def image_ids(module: nn.Module, call: Mapping[str, Any]) -> Grid | None:
    """Flux: `img_ids` [tokens, 3], whose last columns are row and column of each token."""
    ids = call.get("img_ids")
    if not isinstance(ids, Tensor) or ids.numel() == 0 or ids.shape[-1] != 3:
        return None
    ids = ids[0] if ids.dim() == 3 else ids
    if ids.dim() != 2 or bool((ids[:, 0] != ids[0, 0]).any()):
        return None
    height, width = (int(side) + 1 for side in ids[:, 1:].amax(0).tolist())
    rows = torch.arange(height, device=ids.device).repeat_interleave(width)
    columns = torch.arange(width, device=ids.device).repeat(height)
    if height * width != len(ids) or not torch.equal(ids[:, 1].long(), rows):
        return None
    return (height, width) if torch.equal(ids[:, 2].long(), columns) else None


def video_latents(module: nn.Module, call: Mapping[str, Any]) -> Grid | None:
    """Wan, HunyuanVideo, CogVideoX, Mochi and others: latents of five dimensions."""
    latents = call.get("hidden_states")
    channels = _setting(module, "in_channels")
    patch = _patch(module)
    if not isinstance(latents, Tensor) or latents.dim() != 5 or patch is None:
        return None
    dims = [dim for dim in _CHANNEL_DIMS if latents.shape[dim] == channels]
    # As many frames as channels leave the order of these two open, but not the grid.
    readings = {tuple(s for i, s in enumerate(latents.shape) if i not in (0, dim)) for dim in dims}
    return _divide(readings.pop(), patch) if len(readings) == 1 else None


def image_latents(module: nn.Module, call: Mapping[str, Any]) -> Grid | None:
    """SD3, PixArt and others: latents [B, C, H, W] of an image."""
    latents = call.get("hidden_states")
    patch = _patch(module)
    if not isinstance(latents, Tensor) or latents.dim() != 4 or patch is None:
        return None
    if latents.shape[1] != _setting(module, "in_channels"):
        return None
    return _divide(tuple(latents.shape[2:]), patch[1:])


READERS: tuple[Reader, ...] = (
    sizes_in_call,
    image_shapes,
    image_ids,
    video_latents,
    image_latents,
)


@cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _setting(module: nn.Module, name: str) -> Any:
    """Return a value of the model's config; diffusers' is a mapping with attributes."""
    return getattr(getattr(module, "config", None), name, None)


def _patch(module: nn.Module) -> Grid | None:
    """Return the patch per axis: `patch_size` (T, H, W), or of H and W with `patch_size_t`."""
    size, frames = _setting(module, "patch_size"), _setting(module, "patch_size_t")
    if isinstance(size, list | tuple):
        return tuple(size) if len(size) == 3 and frames is None else None
    return (frames or 1, size, size) if isinstance(size, int) else None


def _divide(sizes: Grid, patch: Grid) -> Grid | None:
    pairs = list(zip(sizes, patch, strict=True))
    return None if any(n % p for n, p in pairs) else tuple(n // p for n, p in pairs)


def _fitting(sizes: tuple[Any, ...], call: Mapping[str, Any]) -> Grid | None:
    """Return sizes that are integers and multiply up to the length of the packed tokens."""
    tokens = call.get("hidden_states")
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        return None
    valid = all(isinstance(size, int) and size > 0 for size in sizes)
    return sizes if valid and math.prod(sizes) == tokens.shape[1] else None
