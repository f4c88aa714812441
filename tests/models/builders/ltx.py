"""LTX-Video and LTX-2: the pipeline hands over packed tokens and says the grid in integers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import CROSS
from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import TEXT
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


def _sizes(grid: Grid) -> dict[str, int]:
    return dict(zip(("num_frames", "height", "width"), grid, strict=True))


@builder("ltx", "LTX", "LTXVideoTransformer3DModel", (VIDEO, CROSS) * 2, axes=())
def ltx(grid: Grid, batch: int = 1) -> Case:
    """LTX-Video: rotary table from num_frames, height and width."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=2,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "encoder_attention_mask": prompt_mask(batch),
        **_sizes(grid),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder("ltx coordinates", "LTX", "LTXVideoTransformer3DModel", (VIDEO, CROSS) * 2, axes=())
def ltx_coordinates(grid: Grid, batch: int = 1) -> Case:
    """LTX-Video as its condition pipeline calls it: the places of the tokens in a tensor."""
    case = ltx(grid, batch)
    inputs = {k: v for k, v in case.inputs.items() if k not in _sizes(grid)}
    coordinates = 8 * grid_ids(grid).T.repeat(batch, 1, 1)
    return Case(case.model, {**inputs, "video_coords": coordinates})


# Self-attention of video and audio, text for both, then each attends the other.
_AUDIO_VIDEO = (VIDEO, TEXT, CROSS, CROSS, CROSS, CROSS)


def _ltx2_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": HEADS * 8,
        "num_layers": 2,
        "caption_channels": 16,
        "rope_double_precision": False,
    }


@builder("ltx 2", "LTX", "LTX2VideoTransformer3DModel", _AUDIO_VIDEO * 2, axes=())
def ltx_2(grid: Grid, batch: int = 1) -> Case:
    """LTX-2: video and audio side by side."""
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "audio_hidden_states": text(batch, 4, length=9),
        "encoder_hidden_states": text(batch),
        "audio_encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "encoder_attention_mask": prompt_mask(batch),
        "audio_encoder_attention_mask": prompt_mask(batch),
        **_sizes(grid),
        "fps": 25.0,
        "audio_num_frames": 9,
        "return_dict": False,
    }
    return Case(randomized(diffusers.LTX2VideoTransformer3DModel(**_ltx2_config())), inputs)


@builder(
    "sana wm refiner",
    "Sana",
    "SanaWMLTX2RefinerTransformer3DModel",
    (VIDEO, CROSS) * 2,
    axes=(),
)
def sana_wm_refiner(grid: Grid, batch: int = 1) -> Case:
    """The refiner of Sana-WM, LTX-2's video half, without its cache; the rotary table comes in."""
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(**_ltx2_config())
    coordinates = model.rope.prepare_video_coords(batch, *grid, torch.device("cpu"), fps=25.0)
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "video_rotary_emb": model.rope(coordinates),
        "encoder_attention_mask": prompt_mask(batch),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)
