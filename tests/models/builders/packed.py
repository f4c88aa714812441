"""Models over one sequence of text and image tokens, packed by the pipeline or the model."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import CROSS
from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import IMAGE
from builders.base import TEXT
from builders.base import TEXT_LENGTH
from builders.base import Case
from builders.base import Grid
from builders.base import Sites
from builders.base import builder
from builders.base import grid_ids
from builders.base import image
from builders.base import prompt_mask
from builders.base import randomized
from builders.base import steps
from builders.base import text
from builders.base import tokens
from builders.base import video

_INNER = HEADS * HEAD_DIM
_PACKED: dict[str, Any] = {"grid": IMAGE, "axes": ()}


_HIDREAM_LENGTH = 48


def _hidream_sites(grid: Grid, _batch: int) -> Sites:
    # An image that is not square is padded to the longest sequence; the text follows that.
    padding = _HIDREAM_LENGTH - torch.Size(grid).numel()
    return (video(after=padding + 3 * TEXT_LENGTH),) * 2


@builder("hidream", "HiDream", "HiDreamImageTransformer2DModel", _hidream_sites, grid=IMAGE)
def hidream(grid: Grid, batch: int = 1) -> Case:
    """HiDream: padding behind the image, then three prompts; mixture of experts."""
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        caption_channels=[16, 12],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(12, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    inputs = {
        "hidden_states": image(grid, 4, 2, batch),
        "timesteps": steps(batch),
        "encoder_hidden_states_t5": text(batch, 16),
        "encoder_hidden_states_llama3": torch.randn(2, batch, TEXT_LENGTH, 12),
        "pooled_embeds": torch.randn(batch, 8),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder(
    "hunyuan image",
    "HunyuanImage",
    "HunyuanImageTransformer2DModel",
    (TEXT, *(video(after=TEXT_LENGTH + 4),) * 2),
    grid=IMAGE,
)
def hunyuan_image(grid: Grid, batch: int = 1) -> Case:
    """HunyuanImage 2.1: two prompts, sorted by what is padding, behind the image."""
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
    )
    inputs = {
        "hidden_states": image(grid, 4, 1, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": prompt_mask(batch),
        "encoder_hidden_states_2": text(batch, 12, 4),
        "encoder_attention_mask_2": prompt_mask(batch, 4),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder("nucleus image", "Nucleus", "NucleusMoEImageTransformer2DModel", (CROSS,) * 2, **_PACKED)
def nucleus_image(grid: Grid, batch: int = 1) -> Case:
    """Nucleus-Image: queries of the image, keys of image and text."""
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "img_shapes": [(1, *grid)] * batch,
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_mask": prompt_mask(batch).bool(),
        "timestep": steps(batch, 0.5),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder(
    "omnigen",
    "OmniGen",
    "OmniGenTransformer2DModel",
    (video(before=TEXT_LENGTH + 1),) * 2,
    grid=IMAGE,
)
def omnigen(grid: Grid, batch: int = 1) -> Case:
    """OmniGen: a language model; the prompt's part of the mask is causal."""
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=_INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=20,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=12,
        time_step_dim=16,
    )
    length = TEXT_LENGTH + 1 + torch.Size(grid).numel()
    mask = torch.ones(length, length)
    mask[:TEXT_LENGTH] = torch.ones(length, length).tril()[:TEXT_LENGTH]
    inputs = {
        "hidden_states": image(grid, 4, 2, batch),
        "timestep": steps(batch),
        "input_ids": torch.arange(1, TEXT_LENGTH + 1).repeat(batch, 1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.repeat(batch, 1, 1),
        "position_ids": torch.arange(length).repeat(batch, 1),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


def _z_image_sites(grid: Grid, _batch: int) -> Sites:
    # Image and text are each padded to a multiple of 32 tokens.
    padding = -torch.Size(grid).numel() % 32
    return (video(after=padding), TEXT, video(after=padding + 32))


@builder("z-image", "Z-Image", "ZImageTransformer2DModel", _z_image_sites, **_PACKED)
def z_image(grid: Grid, batch: int = 1) -> Case:
    """Z-Image: lists of images and prompts, each padded, packed by the model."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=_INNER,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    inputs = {
        "x": list(image(grid, 4, 2, batch).unsqueeze(2)),
        "t": steps(batch, 0.5),
        "cap_feats": [text(1, length=TEXT_LENGTH - i)[0] for i in range(batch)],
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


_BEFORE = video(before=TEXT_LENGTH)


@builder("ideogram 4", "Ideogram", "Ideogram4Transformer2DModel", (_BEFORE,) * 2, **_PACKED)
def ideogram(grid: Grid, batch: int = 1) -> Case:
    """Ideogram 4: one sequence whose parts are told apart by an indicator."""
    from diffusers.models.transformers import transformer_ideogram4 as source

    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=12,
        mrope_section=(4, 2, 2),
    )
    places = torch.cat([torch.arange(TEXT_LENGTH)[:, None].repeat(1, 3), _places(grid)])
    indicator = torch.full((batch, len(places)), source.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :TEXT_LENGTH] = source.LLM_TOKEN_INDICATOR
    inputs = {
        "hidden_states": torch.randn(batch, len(places), 4),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": torch.randn(batch, len(places), 12),
        "position_ids": places.repeat(batch, 1, 1),
        "segment_ids": torch.ones(batch, len(places), dtype=torch.long),
        "indicator": indicator,
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


def _places(grid: Grid) -> torch.Tensor:
    ids = grid_ids(grid).long() + TEXT_LENGTH
    return torch.cat([torch.full((len(ids), 1), TEXT_LENGTH), ids], dim=1)


@builder("krea 2", "Krea", "Krea2Transformer2DModel", (TEXT, TEXT, *(_BEFORE,) * 2), **_PACKED)
def krea_2(grid: Grid, batch: int = 1) -> Case:
    """Krea 2: fuses the layers of a text encoder; fewer key heads than query heads."""
    model = diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    places = torch.cat([torch.zeros(TEXT_LENGTH, 3), _places(grid).float()])
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 3, 32),
        "timestep": steps(batch, 0.5),
        "position_ids": places,
        "encoder_attention_mask": prompt_mask(batch).bool(),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder(
    "minimax h3",
    "MiniMax",
    "MiniMaxH3Transformer3DModel",
    (TEXT, *(video(before=TEXT_LENGTH, after=9),) * 2),
    axes=(),
)
def minimax_h3(grid: Grid, batch: int = 1) -> Case:
    """MiniMax-H3: text, video and audio put into one sequence by indices."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=24,
        hidden_size=_INNER,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=4,
    )
    end = TEXT_LENGTH + torch.Size(grid).numel()
    parts = [torch.arange(TEXT_LENGTH), torch.arange(TEXT_LENGTH, end), torch.arange(end, end + 9)]
    axes = (torch.arange(TEXT_LENGTH)[:, None].repeat(1, 3), grid_ids(grid).long() + 7)
    sound = torch.arange(9)[:, None].repeat(1, 3)
    inputs = {
        "hidden_states": tokens(grid, 16, batch),
        "audio_hidden_states": text(batch, 4, 9),
        "encoder_hidden_states": text(batch),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros(end + 9, dtype=torch.long),
        "token_tags": torch.cat([torch.full_like(part, tag) for tag, part in enumerate(parts)]),
        "position_ids": torch.cat([*axes, sound]),
        "video_indices": parts[1],
        "audio_indices": parts[2],
        "text_indices": parts[0],
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder(
    "bria fibo 2",
    "Bria",
    "BriaFibo2Transformer2DModel",
    (video(), CROSS, TEXT, *(video(before=8),) * 2, CROSS),
    grid=IMAGE,
)
def bria_fibo_2(grid: Grid, batch: int = 1) -> Case:
    """Bria Fibo 2: the prompt is condensed into a few tokens."""
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=_INNER,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=HEADS,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=8,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 16, 16),
    )
    inputs = {
        "hidden_states": image(grid, 4, 2, batch),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": torch.randn(batch, 2, TEXT_LENGTH, 16),
        "encoder_attention_mask": prompt_mask(batch).bool(),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)


@builder(
    "qwen image 2.1",
    "QwenImage",
    "QwenImage21Transformer2DModel",
    (TEXT, CROSS) * 2,
    grid=(6, 8),
    axes=(),
)
def qwen_image_21(grid: Grid, batch: int = 1) -> Case:
    """Qwen-Image 2.1: causal among the text, then the image over both."""
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    # A slot of the language model's sequence stands for four image tokens.
    slots = torch.arange(TEXT_LENGTH + torch.Size(grid).numel() // 4)
    inputs = {
        "hidden_states": tokens(grid, 4, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, 0.5),
        "img_shapes": [[(1, *grid)]] * batch,
        "img_mask": (slots >= TEXT_LENGTH).repeat(batch, 1),
        "encoder_hidden_states_mask": prompt_mask(batch).bool(),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)
