"""Further video models that embed patches by a Conv3d or by reshapes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import CROSS
from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import TEXT
from builders.base import TEXT_LENGTH
from builders.base import VIDEO
from builders.base import Case
from builders.base import Grid
from builders.base import Sites
from builders.base import builder
from builders.base import frames_first
from builders.base import latents
from builders.base import prompt_mask
from builders.base import randomized
from builders.base import steps
from builders.base import text
from builders.base import video

_INNER = HEADS * HEAD_DIM


def _inputs(grid: Grid, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, 4, 2, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
        **more,
    }


@builder("cosmos", "Cosmos", "CosmosTransformer3DModel", (VIDEO, CROSS) * 2)
def cosmos(grid: Grid, batch: int = 1) -> Case:
    """Cosmos: learned positions are added in every block."""
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        patch_size=(1, 2, 2),
        # The padding of the latents would be resized by torchvision, which need not be there.
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    inputs = _inputs(grid, batch, attention_mask=prompt_mask(batch).bool(), fps=24)
    return Case(randomized(model), inputs)


@builder("sana video", "Sana", "SanaVideoTransformer3DModel", (CROSS,) * 2)
def sana_video(grid: Grid, batch: int = 1) -> Case:
    """Sana-Video: linear self-attention."""
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=_INNER,
        caption_channels=16,
        rope_max_seq_len=32,
    )
    inputs = _inputs(grid, batch, encoder_attention_mask=prompt_mask(batch))
    return Case(randomized(model), inputs)


_JOINT_WITH_IMAGE = video(after=2 + TEXT_LENGTH)


@builder("motif video", "Motif", "MotifVideoTransformer3DModel", (_JOINT_WITH_IMAGE,) * 2)
def motif_video(grid: Grid, batch: int = 1) -> Case:
    """Motif-Video: an image and a masked prompt behind the video."""
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = _inputs(
        grid,
        batch,
        encoder_attention_mask=prompt_mask(batch),
        image_embeds=torch.randn(batch, 2, 8),
    )
    return Case(randomized(model), inputs)


def _kandinsky_inputs(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return _inputs(
        grid,
        batch,
        hidden_states=torch.randn(batch, frames, 2 * height, 2 * width, 4),
        pooled_projections=torch.randn(batch, 8),
        visual_rope_pos=tuple(torch.arange(extent) for extent in grid),
    )


_CHANNELS_LAST = (1, 2, 3)
_KANDINSKY_5 = (TEXT, *(VIDEO, CROSS) * 2)


@builder(
    "kandinsky 5",
    "Kandinsky",
    "Kandinsky5Transformer3DModel",
    _KANDINSKY_5,
    axes=_CHANNELS_LAST,
)
def kandinsky_5(grid: Grid, batch: int = 1) -> Case:
    """Kandinsky 5: channels last, patches cut by a reshape."""
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=_INNER,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    inputs = _kandinsky_inputs(grid, batch)
    return Case(randomized(model), {**inputs, "text_rope_pos": torch.arange(TEXT_LENGTH)})


@builder(
    "kandinsky 6",
    "Kandinsky",
    "Kandinsky6Transformer3DModel",
    (TEXT, TEXT, *(VIDEO, CROSS, TEXT, CROSS, CROSS, CROSS) * 2),
    axes=_CHANNELS_LAST,
)
def kandinsky_6(grid: Grid, batch: int = 1) -> Case:
    """Kandinsky 6: video and audio side by side."""
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=_INNER,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    inputs = _kandinsky_inputs(grid, batch)
    more = {
        "audio_hidden_states": text(batch, 4, 9),
        "encoder_attention_mask": prompt_mask(batch).bool(),
    }
    return Case(randomized(model), {**inputs, **more})


@builder(
    "joyimage edit",
    "JoyImage",
    "JoyImageEditTransformer3DModel",
    (video(after=TEXT_LENGTH),) * 2,
)
def joyimage(grid: Grid, batch: int = 1) -> Case:
    """JoyImage-Edit: images as frames of a video."""
    model = diffusers.JoyImageEditTransformer3DModel(**_joyimage_config())
    return Case(randomized(model), _inputs(grid, batch))


def _joyimage_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "hidden_size": _INNER,
        "num_attention_heads": HEADS,
        "text_dim": 16,
        "mlp_width_ratio": 2.0,
        "num_layers": 2,
        "rope_dim_list": [4, 6, 6],
    }


@builder(
    "joyimage edit plus",
    "JoyImage",
    "JoyImageEditPlusTransformer3DModel",
    (video(after=TEXT_LENGTH),) * 2,
    axes=(),
)
def joyimage_plus(grid: Grid, batch: int = 1) -> Case:
    """JoyImage-Edit Plus: patches in a row, with the grid in integers."""
    model = diffusers.JoyImageEditPlusTransformer3DModel(**_joyimage_config())
    inputs = _inputs(
        grid,
        batch,
        hidden_states=torch.randn(batch, torch.Size(grid).numel(), 4, 1, 2, 2),
        encoder_hidden_states_mask=prompt_mask(batch),
        shape_list=[[grid]] * batch,
    )
    return Case(randomized(model), inputs)


def _helios_config() -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_dim": (4, 6, 6),
    }


@builder("helios", "Helios", "HeliosTransformer3DModel", (VIDEO, CROSS) * 2)
def helios(grid: Grid, batch: int = 1) -> Case:
    """Helios without history."""
    model = diffusers.HeliosTransformer3DModel(**_helios_config())
    return Case(randomized(model), _inputs(grid, batch))


def _helios_sites(grid: Grid, _batch: int) -> Sites:
    _, height, width = grid
    middle = -(-height // 2) * -(-width // 2)
    long = -(-height // 4) * -(-width // 4)
    return (video(before=2 * height * width + middle + long), CROSS) * 2


@builder("helios history", "Helios", "HeliosTransformer3DModel", _helios_sites)
def helios_history(grid: Grid, batch: int = 1) -> Case:
    """Helios: history of three coarseness levels in front of the video."""
    case = helios(grid, batch)
    frames, height, width = grid

    def frame_indices(start: int, count: int) -> torch.Tensor:
        return torch.arange(start, start + count).repeat(batch, 1)

    extra = {
        "indices_hidden_states": frame_indices(8, frames),
        "indices_latents_history_short": frame_indices(6, 2),
        "indices_latents_history_mid": frame_indices(4, 2),
        "indices_latents_history_long": frame_indices(0, 4),
        "latents_history_short": latents((2, height, width), 4, 2, batch),
        "latents_history_mid": latents((2, height, width), 4, 2, batch),
        "latents_history_long": latents((4, height, width), 4, 2, batch),
    }
    return Case(case.model, {**case.inputs, **extra})


@builder("anyflow", "AnyFlow", "AnyFlowTransformer3DModel", (VIDEO, CROSS) * 2, axes=(1, 3, 4))
def anyflow(grid: Grid, batch: int = 1) -> Case:
    """AnyFlow: Wan with two timesteps per frame."""
    model = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = _inputs(
        grid,
        batch,
        hidden_states=frames_first(grid, 4, 2, batch),
        timestep=torch.full((batch, grid[0]), 500.0),
        r_timestep=torch.full((batch, grid[0]), 300.0),
    )
    return Case(randomized(model), inputs)


def _sana_wm(grid: Grid, batch: int, softmax_every: int) -> Case:
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=_INNER,
        num_attention_heads=HEADS,
        patch_size=(1, 2, 2),
        softmax_every_n=softmax_every,
        linear_head_dim=HEAD_DIM,
        caption_channels=16,
        use_chunk_plucker_post_attn=False,
    )
    inputs = _inputs(
        grid,
        batch,
        timestep=torch.full((batch, 1, grid[0]), 500.0),
        encoder_hidden_states=text(batch).unsqueeze(1),
        encoder_attention_mask=prompt_mask(batch),
    )
    return Case(randomized(model), inputs)


# No axes: the linear attention mixes the tokens before the first call sees them.
@builder("sana wm", "Sana", "SanaWMTransformer3DModel", (CROSS, VIDEO, CROSS), axes=())
def sana_wm(grid: Grid, batch: int = 1) -> Case:
    """Sana-WM without a camera: linear attention, and softmax attention in every second block."""
    return _sana_wm(grid, batch, 2)


@builder("sana wm softmax", "Sana", "SanaWMTransformer3DModel", (VIDEO, CROSS) * 2)
def sana_wm_softmax(grid: Grid, batch: int = 1) -> Case:
    """Sana-WM with softmax attention in every block."""
    return _sana_wm(grid, batch, 1)
