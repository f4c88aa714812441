"""Small random configurations of real models, with inputs for a token grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch import nn

TEXT_LENGTH = 7
HEAD_DIM = 16
HEADS = 2

Inputs = dict[str, Any]
Case = tuple[nn.Module, Inputs]


def randomized(model: nn.Module) -> nn.Module:
    """Give every parameter a value, also those that start at zero and would hide an error."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def _latents(grid: tuple[int, ...], channels: int, patch: int, batch: int) -> Tensor:
    frames, height, width = grid
    return torch.randn(batch, channels, frames, height * patch, width * patch)


def wan(grid: tuple[int, ...], batch: int = 1, cls: Any = None, **config: Any) -> Case:
    """Wan 2.1 and 2.2, and models built like it."""
    model = (cls or diffusers.WanTransformer3DModel)(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **config,
    )
    inputs = {
        "hidden_states": _latents(grid, 4, 2, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 16),
        "return_dict": False,
    }
    return randomized(model), inputs


def skyreels(grid: tuple[int, ...], batch: int = 1) -> Case:
    """SkyReels V2."""
    return wan(grid, batch, diffusers.SkyReelsV2Transformer3DModel)


def wan_image(grid: tuple[int, ...], batch: int = 1) -> Case:
    """Wan with image conditioning: two cross-attentions per block."""
    model, inputs = wan(grid, batch, image_dim=16, added_kv_proj_dim=HEADS * HEAD_DIM)
    return model, {
        **inputs,
        # The number of text tokens is written down in the model's code.
        "encoder_hidden_states": torch.randn(batch, 512, 16),
        "encoder_hidden_states_image": torch.randn(batch, 5, 16),
    }


def wan_vace(grid: tuple[int, ...], batch: int = 1) -> Case:
    """Wan VACE: a second patch embedding whose tokens are added to the first one's."""
    model, inputs = wan(
        grid, batch, diffusers.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=6
    )
    return model, {
        **inputs,
        "control_hidden_states": _latents(grid, 6, 2, batch),
        "control_hidden_states_scale": torch.ones(1),
    }


def hunyuan_video(grid: tuple[int, ...], batch: int = 1) -> Case:
    """HunyuanVideo: joint attention, masked where the prompt is padded."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": _latents(grid, 4, 2, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 16),
        "encoder_attention_mask": _prompt_mask(batch),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }
    return randomized(model), inputs


def hunyuan_video_15(grid: tuple[int, ...], batch: int = 1) -> Case:
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
        "hidden_states": _latents(grid, 4, 1, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 16),
        "encoder_attention_mask": _prompt_mask(batch),
        "encoder_hidden_states_2": torch.randn(batch, 3, 12),
        "encoder_attention_mask_2": torch.ones(batch, 3),
        "image_embeds": torch.randn(batch, 2, 8),
        "return_dict": False,
    }
    return randomized(model), inputs


def _prompt_mask(batch: int) -> Tensor:
    mask = torch.ones(batch, TEXT_LENGTH)
    mask[:, -2:] = 0
    return mask


BUILDERS: dict[str, Callable[..., Case]] = {
    "wan": wan,
    "wan image": wan_image,
    "skyreels": skyreels,
    "wan vace": wan_vace,
    "hunyuan video": hunyuan_video,
    "hunyuan video 1.5": hunyuan_video_15,
}
