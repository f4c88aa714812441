"""Wan and the models made from it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import CROSS
from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import VIDEO
from builders.base import Case
from builders.base import Grid
from builders.base import builder
from builders.base import latents
from builders.base import randomized
from builders.base import steps
from builders.base import text

_BLOCK = (VIDEO, CROSS)
_IMAGE_BLOCK = (VIDEO, CROSS, CROSS)


def _config(**config: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
        **config,
    }


def _like_wan(grid: Grid, batch: int, cls: Any, **config: Any) -> Case:
    model = cls(**_config(**config))
    inputs = {
        "hidden_states": latents(grid, 4, 2, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


def _with_image(case: Case, batch: int) -> Case:
    image = {
        # The number of text tokens is written down in the model's code.
        "encoder_hidden_states": text(batch, length=512),
        "encoder_hidden_states_image": text(batch, length=5),
    }
    return Case(case.model, {**case.inputs, **image})


_IMAGE = {"image_dim": 16, "added_kv_proj_dim": HEADS * HEAD_DIM}


@builder("wan", "Wan", "WanTransformer3DModel", _BLOCK * 2)
def wan(grid: Grid, batch: int = 1) -> Case:
    """Wan 2.1 and 2.2, text to video."""
    return _like_wan(grid, batch, diffusers.WanTransformer3DModel)


@builder("wan image", "Wan", "WanTransformer3DModel", _IMAGE_BLOCK * 2)
def wan_image(grid: Grid, batch: int = 1) -> Case:
    """Wan with image conditioning: two cross-attentions per block."""
    case = _like_wan(grid, batch, diffusers.WanTransformer3DModel, **_IMAGE)
    return _with_image(case, batch)


@builder("wan timesteps", "Wan", "WanTransformer3DModel", _BLOCK * 2)
def wan_timesteps(grid: Grid, batch: int = 1) -> Case:
    """Wan 2.2 5B with an image: every token has a timestep of its own."""
    case = _like_wan(grid, batch, diffusers.WanTransformer3DModel)
    length = torch.Size(grid).numel()
    times = torch.full((batch, length), 500.0)
    times[:, : length // grid[0]] = 0.0
    return Case(case.model, {**case.inputs, "timestep": times})


@builder("wan vace", "Wan", "WanVACETransformer3DModel", _BLOCK * 3)
def wan_vace(grid: Grid, batch: int = 1) -> Case:
    """Wan VACE: a second patch embedding whose tokens are added to the first one's."""
    case = _like_wan(
        grid, batch, diffusers.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=6
    )
    control = {
        "control_hidden_states": latents(grid, 6, 2, batch),
        "control_hidden_states_scale": torch.ones(1),
    }
    return Case(case.model, {**case.inputs, **control})


_ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "added_kv_proj_dim": HEADS * HEAD_DIM,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
    "motion_encoder_batch_size": 3,
}


@builder(
    "wan animate", "Wan", "WanAnimateTransformer3DModel", (*_IMAGE_BLOCK, CROSS, *_IMAGE_BLOCK)
)
def wan_animate(grid: Grid, batch: int = 1) -> Case:
    """Wan-Animate: poses are added to all frames but the first, faces attended frame by frame."""
    case = _like_wan(grid, batch, diffusers.WanAnimateTransformer3DModel, **_ANIMATE)
    frames, height, width = grid
    extra = {
        "hidden_states": latents(grid, 12, 2, batch),
        "pose_hidden_states": latents((frames - 1, height, width), 4, 2, batch),
        "face_pixel_values": torch.randn(batch, 3, 4 * (frames - 2) + 1, 16, 16),
    }
    case = _with_image(case, batch)
    return Case(case.model, {**case.inputs, **extra})


@builder("skyreels v2", "Wan", "SkyReelsV2Transformer3DModel", _BLOCK * 2)
def skyreels(grid: Grid, batch: int = 1) -> Case:
    """SkyReels V2."""
    return _like_wan(grid, batch, diffusers.SkyReelsV2Transformer3DModel)


@builder("skyreels v2 causal", "Wan", "SkyReelsV2Transformer3DModel", _BLOCK * 2, grid=(4, 3, 5))
def skyreels_causal(grid: Grid, batch: int = 1) -> Case:
    """SkyReels V2 with diffusion forcing: attention is causal from block to block of frames."""
    case = _like_wan(grid, batch, diffusers.SkyReelsV2Transformer3DModel, num_frame_per_block=2)
    times = torch.linspace(300.0, 700.0, grid[0]).repeat(batch, 1)
    return Case(case.model, {**case.inputs, "timestep": times, "enable_diffusion_forcing": True})


@builder("chronoedit", "Wan", "ChronoEditTransformer3DModel", _IMAGE_BLOCK * 2)
def chronoedit(grid: Grid, batch: int = 1) -> Case:
    """ChronoEdit: Wan with an image and another temporal rotary table."""
    case = _like_wan(grid, batch, diffusers.ChronoEditTransformer3DModel, **_IMAGE)
    return _with_image(case, batch)
