"""HunyuanVideo in its variants."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import HIDDEN_TEXT
from builders.base import TEXT
from builders.base import TEXT_LENGTH
from builders.base import Case
from builders.base import Grid
from builders.base import Sites
from builders.base import builder
from builders.base import latents
from builders.base import prompt_mask
from builders.base import randomized
from builders.base import steps
from builders.base import text
from builders.base import video

# A refiner over the prompt, then one block with two streams and one with a single stream.
_JOINT = (TEXT, video(after=TEXT_LENGTH), video(after=TEXT_LENGTH))
_VIDEO = "HunyuanVideoTransformer3DModel"


def _config(**config: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
        **config,
    }


def _like_hunyuan(grid: Grid, batch: int, cls: Any, **config: Any) -> Case:
    inputs = {
        "hidden_states": latents(grid, 4, 2, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": prompt_mask(batch),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }
    return Case(randomized(cls(**_config(**config))), inputs)


@builder("hunyuan video", "HunyuanVideo", _VIDEO, _JOINT)
def hunyuan_video(grid: Grid, batch: int = 1) -> Case:
    """HunyuanVideo: joint attention, masked where the prompt is padded."""
    return _like_hunyuan(grid, batch, diffusers.HunyuanVideoTransformer3DModel)


@builder("hunyuan video image, channels", "HunyuanVideo", _VIDEO, _JOINT)
def hunyuan_video_concat(grid: Grid, batch: int = 1) -> Case:
    """HunyuanVideo with an image in further channels of the latents."""
    case = _like_hunyuan(
        grid,
        batch,
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=9,
        image_condition_type="latent_concat",
    )
    return Case(case.model, {**case.inputs, "hidden_states": latents(grid, 9, 2, batch)})


@builder("hunyuan video image, token replace", "HunyuanVideo", _VIDEO, _JOINT)
def hunyuan_video_replace(grid: Grid, batch: int = 1) -> Case:
    """HunyuanVideo with an image as first frame, modulated apart from the others."""
    return _like_hunyuan(
        grid,
        batch,
        diffusers.HunyuanVideoTransformer3DModel,
        image_condition_type="token_replace",
    )


_IMAGE_TOKENS = 3


def _history_tokens(grid: Grid) -> int:
    _, height, width = grid
    halves = -(-height // 2) * -(-width // 2)
    quarters = -(-height // 4) * -(-width // 4)
    return 2 * height * width + halves + quarters


def _framepack_sites(grid: Grid, batch: int) -> Sites:
    # One prompt is cut to its length; several are padded to the longest.
    after = _IMAGE_TOKENS + TEXT_LENGTH - (HIDDEN_TEXT if batch == 1 else 0)
    return (TEXT, *(video(_history_tokens(grid), after),) * 2)


@builder(
    "hunyuan video framepack",
    "HunyuanVideo",
    "HunyuanVideoFramepackTransformer3DModel",
    _framepack_sites,
)
def hunyuan_framepack(grid: Grid, batch: int = 1) -> Case:
    """Framepack: packed history of three coarseness levels in front, image and text behind."""
    case = _like_hunyuan(
        grid,
        batch,
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    frames, height, width = grid
    extra = {
        "image_embeds": torch.randn(batch, _IMAGE_TOKENS, 8),
        "indices_latents": torch.arange(8, 8 + frames),
        "latents_clean": latents((2, height, width), 4, 2, batch),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": latents((2, height, width), 4, 2, batch),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": latents((4, height, width), 4, 2, batch),
        "indices_latents_history_4x": torch.arange(1, 5),
    }
    return Case(case.model, {**case.inputs, **extra})


_CONDITION_TOKENS = TEXT_LENGTH + 4 + 2


@builder(
    "hunyuan video 1.5",
    "HunyuanVideo",
    "HunyuanVideo15Transformer3DModel",
    (TEXT, video(after=_CONDITION_TOKENS), video(after=_CONDITION_TOKENS)),
)
def hunyuan_video_15(grid: Grid, batch: int = 1) -> Case:
    """HunyuanVideo 1.5: joint attention with two prompts and an image."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": latents(grid, 4, 1, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": prompt_mask(batch),
        "encoder_hidden_states_2": text(batch, 12, length=4),
        "encoder_attention_mask_2": prompt_mask(batch, 4),
        "image_embeds": torch.randn(batch, 2, 8),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)
