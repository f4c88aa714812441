"""Image models that take packed latents and a list of positions, Flux and those made from it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import IMAGE
from builders.base import SEVERAL
from builders.base import TEXT
from builders.base import TEXT_LENGTH
from builders.base import VIDEO
from builders.base import Case
from builders.base import Grid
from builders.base import builder
from builders.base import grid_ids
from builders.base import prompt_mask
from builders.base import randomized
from builders.base import steps
from builders.base import text
from builders.base import tokens
from builders.base import video

_JOINT = video(before=TEXT_LENGTH)
_PACKED: dict[str, Any] = {"grid": IMAGE, "axes": ()}
_AXES = {"axes_dims_rope": (4, 6, 6)}


def _image_ids(grid: Grid, columns: tuple[int, int] = (1, 2), width: int = 3) -> Tensor:
    ids = torch.zeros(torch.Size(grid).numel(), width)
    ids[:, list(columns)] = grid_ids(grid)
    return ids


def _config(**config: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        **config,
    }


def _inputs(grid: Grid, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": tokens(grid, 4, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, 0.5),
        "img_ids": _image_ids(grid),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
        "return_dict": False,
        **more,
    }


@builder("flux", "Flux", "FluxTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def flux(grid: Grid, batch: int = 1) -> Case:
    """Flux.1: text in front."""
    model = diffusers.FluxTransformer2DModel(
        **_config(patch_size=1, pooled_projection_dim=8, guidance_embeds=True, **_AXES)
    )
    more = {"pooled_projections": torch.randn(batch, 8), "guidance": torch.full((batch,), 3.5)}
    return Case(randomized(model), _inputs(grid, batch, **more))


@builder("flux kontext", "Flux", "FluxTransformer2DModel", (SEVERAL,) * 2, **_PACKED)
def flux_kontext(grid: Grid, batch: int = 1) -> Case:
    """Flux.1 Kontext: the tokens of a second image behind those of the first."""
    model, inputs = flux(grid, batch)
    second = _image_ids(grid) + torch.tensor([1.0, 0.0, 0.0])
    both = {
        "hidden_states": torch.cat([inputs["hidden_states"], tokens(grid, 4, batch)], dim=1),
        "img_ids": torch.cat([inputs["img_ids"], second]),
    }
    return Case(model, {**inputs, **both})


@builder("flux 2", "Flux", "Flux2Transformer2DModel", (_JOINT,) * 2, **_PACKED)
def flux_2(grid: Grid, batch: int = 1) -> Case:
    """Flux.2: positions of four axes, one feed-forward with the attention."""
    model = diffusers.Flux2Transformer2DModel(
        **_config(patch_size=1, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))
    )
    more = {
        "img_ids": _image_ids(grid, (1, 2), 4),
        "txt_ids": _image_ids((1, TEXT_LENGTH), (2, 3), 4),
        "guidance": torch.full((batch,), 3.5),
    }
    return Case(randomized(model), _inputs(grid, batch, **more))


@builder("flux 3", "Flux", "Flux3Transformer2DModel", (TEXT, VIDEO, _JOINT), **_PACKED)
def flux_3(grid: Grid, batch: int = 1) -> Case:
    """Flux.3: blocks of text alone, of the image alone, then of both."""
    model = diffusers.Flux3Transformer2DModel(
        **_config(timestep_channels=16, axes_dims_rope=(4, 4, 4, 4))
    )
    more = {
        "img_ids": _image_ids(grid, (1, 2), 4),
        "txt_ids": _image_ids((1, TEXT_LENGTH), (2, 3), 4),
    }
    return Case(randomized(model), _inputs(grid, batch, **more))


@builder("chroma", "Flux", "ChromaTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def chroma(grid: Grid, batch: int = 1) -> Case:
    """Chroma: Flux with a mask over text and image."""
    model = diffusers.ChromaTransformer2DModel(
        **_config(
            patch_size=1,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **_AXES,
        )
    )
    valid = torch.cat([prompt_mask(batch), torch.ones(batch, torch.Size(grid).numel())], dim=1)
    return Case(randomized(model), _inputs(grid, batch, attention_mask=valid.bool()))


@builder("bria", "Flux", "BriaTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def bria(grid: Grid, batch: int = 1) -> Case:
    """Bria 3.2."""
    model = diffusers.BriaTransformer2DModel(**_config(patch_size=1, axes_dims_rope=[4, 6, 6]))
    return Case(randomized(model), _inputs(grid, batch))


@builder("bria fibo", "Flux", "BriaFiboTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def bria_fibo(grid: Grid, batch: int = 1) -> Case:
    """Bria Fibo: each layer of the text encoder, and an additive outer product of the padding."""
    model = diffusers.BriaFiboTransformer2DModel(
        **_config(patch_size=1, text_encoder_dim=12, axes_dims_rope=[4, 6, 6])
    )
    valid = torch.cat([prompt_mask(batch), torch.ones(batch, torch.Size(grid).numel())], dim=1)
    pairs = torch.einsum("bi,bj->bij", valid, valid)
    mask = torch.where(pairs == 1, 0.0, float("-inf"))[:, None]
    more = {
        "text_encoder_layers": [text(batch, 12) for _ in range(2)],
        "joint_attention_kwargs": {"attention_mask": mask},
    }
    return Case(randomized(model), _inputs(grid, batch, **more))


@builder("ovis image", "Flux", "OvisImageTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def ovis_image(grid: Grid, batch: int = 1) -> Case:
    """Ovis-Image."""
    model = diffusers.OvisImageTransformer2DModel(**_config(patch_size=1, **_AXES))
    return Case(randomized(model), _inputs(grid, batch))


@builder("longcat image", "Flux", "LongCatImageTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def longcat_image(grid: Grid, batch: int = 1) -> Case:
    """LongCat-Image."""
    model = diffusers.LongCatImageTransformer2DModel(
        **_config(patch_size=1, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6])
    )
    return Case(randomized(model), _inputs(grid, batch))


@builder("qwen image", "QwenImage", "QwenImageTransformer2DModel", (_JOINT,) * 2, **_PACKED)
def qwen_image(grid: Grid, batch: int = 1) -> Case:
    """Qwen-Image: the grid in integers, padding masked."""
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        **_AXES,
    )
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_mask": prompt_mask(batch).bool(),
        "timestep": steps(batch, 0.5),
        "img_shapes": [[(1, *grid)]] * batch,
        "return_dict": False,
    }
    return Case(randomized(model), inputs)
