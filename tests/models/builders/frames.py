"""Video models that embed patches frame by frame, by a Conv2d over folded frames."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import CROSS
from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import HIDDEN_TEXT
from builders.base import PARTIAL
from builders.base import TEXT_LENGTH
from builders.base import VIDEO
from builders.base import Case
from builders.base import Grid
from builders.base import Sites
from builders.base import builder
from builders.base import grid_ids
from builders.base import latents
from builders.base import prompt_mask
from builders.base import randomized
from builders.base import rotary
from builders.base import steps
from builders.base import text
from builders.base import video

_INNER = HEADS * HEAD_DIM


def _mochi_sites(_grid: Grid, batch: int) -> Sites:
    # A pooling query over the prompt, then one call per sample with its prompt's valid tokens.
    per_sample = tuple(video(after=TEXT_LENGTH - HIDDEN_TEXT - i) for i in range(batch))
    return (CROSS, *per_sample * 2)


@builder("mochi", "Mochi", "MochiTransformer3DModel", _mochi_sites)
def mochi(grid: Grid, batch: int = 1) -> Case:
    """Mochi: padding is cut off the prompt, sample by sample."""
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=TEXT_LENGTH,
    )
    inputs = {
        "hidden_states": latents(grid, 4, 2, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "encoder_attention_mask": prompt_mask(batch).bool(),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


def _allegro_rotary(grid: Grid) -> tuple[Any, Any]:
    tables = tuple(rotary((extent,), 16) for extent in grid)
    return tables, tuple(place[None] for place in grid_ids(grid).long().T)


@builder("allegro", "Allegro", "AllegroTransformer3DModel", (VIDEO, CROSS) * 2)
def allegro(grid: Grid, batch: int = 1) -> Case:
    """Allegro: rotary embedding looked up by the indices of each token."""
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=48,
        num_layers=2,
        cross_attention_dim=HEADS * 48,
        sample_height=2 * grid[1],
        sample_width=2 * grid[2],
        sample_frames=grid[0],
        caption_channels=16,
    )
    inputs = {
        "hidden_states": latents(grid, 4, 2, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "attention_mask": torch.ones(batch, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_attention_mask": prompt_mask(batch),
        "image_rotary_emb": _allegro_rotary(grid),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


_EASYANIMATE = (video(before=TEXT_LENGTH),) * 2


@builder("easyanimate", "EasyAnimate", "EasyAnimateTransformer3DModel", _EASYANIMATE)
def easyanimate(grid: Grid, batch: int = 1) -> Case:
    """EasyAnimate: rotary embedding written in place into the part of the video."""
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=2 * grid[2],
        sample_height=2 * grid[1],
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    inputs = {
        "hidden_states": latents(grid, 4, 2, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder("latte", "Latte", "LatteTransformer3DModel", (PARTIAL, CROSS, PARTIAL) * 2)
def latte(grid: Grid, batch: int = 1) -> Case:
    """Latte: attention within frames and along time in turn, never over the whole grid."""
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=_INNER,
        attention_bias=True,
        sample_size=2 * max(grid),
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=grid[0],
    )
    inputs = {
        "hidden_states": latents(grid, 4, 2, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)
