"""CogVideoX and ConsisID."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import TEXT_LENGTH
from builders.base import Case
from builders.base import Grid
from builders.base import builder
from builders.base import frames_first
from builders.base import randomized
from builders.base import rotary
from builders.base import steps
from builders.base import text
from builders.base import video

_JOINT = video(before=TEXT_LENGTH)
_COGVIDEOX = "CogVideoXTransformer3DModel"


def _config(grid: Grid, **config: Any) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 2 * width,
        "sample_height": 2 * height,
        "sample_frames": 4 * (frames - 1) + 1,
        "patch_size": 2,
        "max_text_seq_length": TEXT_LENGTH,
        **config,
    }


def _inputs(grid: Grid, batch: int, patch_t: int = 1) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": frames_first((frames * patch_t, height, width), 4, 2, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@builder("cogvideox 2b", "CogVideoX", _COGVIDEOX, (_JOINT,) * 2, axes=(1, 3, 4))
def cogvideox_2b(grid: Grid, batch: int = 1) -> Case:
    """CogVideoX 2B: positions are added to the tokens; text in front."""
    model = diffusers.CogVideoXTransformer3DModel(**_config(grid))
    return Case(randomized(model), _inputs(grid, batch))


@builder("cogvideox 5b", "CogVideoX", _COGVIDEOX, (_JOINT,) * 2, axes=(1, 3, 4))
def cogvideox_5b(grid: Grid, batch: int = 1) -> Case:
    """CogVideoX 5B: rotary embedding, computed by the pipeline."""
    model = diffusers.CogVideoXTransformer3DModel(
        **_config(grid, use_rotary_positional_embeddings=True)
    )
    return Case(randomized(model), {**_inputs(grid, batch), "image_rotary_emb": rotary(grid)})


@builder("cogvideox 1.5", "CogVideoX", _COGVIDEOX, (_JOINT,) * 2, axes=(1, 3, 4))
def cogvideox_15(grid: Grid, batch: int = 1) -> Case:
    """CogVideoX 1.5: patches of two frames, cut by reshapes and a linear layer."""
    model = diffusers.CogVideoXTransformer3DModel(
        **_config(
            grid,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            patch_bias=False,
            ofs_embed_dim=8,
        )
    )
    extra = {"image_rotary_emb": rotary(grid), "ofs": torch.full((batch,), 2.0)}
    return Case(randomized(model), {**_inputs(grid, batch, patch_t=2), **extra})


_FACE = {
    "is_train_face": True,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 4,
    "LFE_vit_dim": 4,
    "LFE_depth": 2,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 2,
    "LFE_output_dim": 21,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 2,
}


@builder("consisid", "CogVideoX", "ConsisIDTransformer3DModel", (_JOINT,) * 2, axes=(1, 3, 4))
def consisid(grid: Grid, batch: int = 1) -> Case:
    """ConsisID: CogVideoX whose video attends a face, by matrix products and not by SDPA."""
    model = diffusers.ConsisIDTransformer3DModel(
        **_config(grid, use_rotary_positional_embeddings=True, **_FACE)
    )
    extra = {
        "image_rotary_emb": rotary(grid),
        "id_cond": torch.randn(batch, 4),
        "id_vit_hidden": [torch.randn(batch, 3, 4) for _ in range(2)],
    }
    return Case(randomized(model), {**_inputs(grid, batch), **extra})
