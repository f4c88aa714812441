"""Image models that cut the latents into patches themselves."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from builders.base import CROSS
from builders.base import HEAD_DIM
from builders.base import HEADS
from builders.base import HIDDEN_TEXT
from builders.base import IMAGE
from builders.base import SEVERAL
from builders.base import TEXT
from builders.base import TEXT_LENGTH
from builders.base import VIDEO
from builders.base import Case
from builders.base import Grid
from builders.base import Sites
from builders.base import builder
from builders.base import image
from builders.base import prompt_mask
from builders.base import randomized
from builders.base import rotary
from builders.base import steps
from builders.base import text
from builders.base import video

_INNER = HEADS * HEAD_DIM


def _config(**config: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "patch_size": 2,
        **config,
    }


def _inputs(grid: Grid, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": image(grid, 4, 2, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "return_dict": False,
        **more,
    }


# The first layer has a second attention over the image alone.
_SD3 = (video(after=TEXT_LENGTH), VIDEO, video(after=TEXT_LENGTH))


@builder("sd3", "SD3", "SD3Transformer2DModel", _SD3, grid=IMAGE)
def sd3(grid: Grid, batch: int = 1) -> Case:
    """Stable Diffusion 3.5: text behind the image; learned table of positions, cropped."""
    model = diffusers.SD3Transformer2DModel(
        **_config(
            sample_size=32,
            joint_attention_dim=16,
            caption_projection_dim=_INNER,
            pooled_projection_dim=8,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )
    inputs = _inputs(grid, batch, pooled_projections=torch.randn(batch, 8))
    return Case(randomized(model), inputs)


_AURA = video(before=8 + TEXT_LENGTH)


@builder("auraflow", "AuraFlow", "AuraFlowTransformer2DModel", (_AURA,) * 2, grid=IMAGE)
def auraflow(grid: Grid, batch: int = 1) -> Case:
    """AuraFlow: eight registers and the text in front."""
    config = _config(
        sample_size=32,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=16,
        caption_projection_dim=_INNER,
        pos_embed_max_size=144,
    )
    del config["num_layers"]
    model = diffusers.AuraFlowTransformer2DModel(**config)
    return Case(randomized(model), _inputs(grid, batch))


@builder("pixart", "PixArt", "PixArtTransformer2DModel", (VIDEO, CROSS) * 2, grid=IMAGE)
def pixart(grid: Grid, batch: int = 1) -> Case:
    """PixArt Sigma."""
    model = diffusers.PixArtTransformer2DModel(
        **_config(
            cross_attention_dim=_INNER,
            sample_size=16,
            norm_num_groups=1,
            caption_channels=16,
            use_additional_conditions=False,
        )
    )
    inputs = _inputs(
        grid,
        batch,
        encoder_attention_mask=prompt_mask(batch),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return Case(randomized(model), inputs)


@builder("dit", "DiT", "DiTTransformer2DModel", (VIDEO,) * 2, grid=(5, 5))
def dit(grid: Grid, batch: int = 1) -> Case:
    """DiT: class labels instead of text; square images only."""
    model = diffusers.DiTTransformer2DModel(
        **_config(sample_size=2 * grid[0], norm_num_groups=1, num_embeds_ada_norm=1000)
    )
    inputs = _inputs(grid, batch, class_labels=torch.arange(batch))
    inputs["timestep"] = inputs["timestep"].long()
    del inputs["encoder_hidden_states"]
    return Case(randomized(model), inputs)


@builder("sana", "Sana", "SanaTransformer2DModel", (CROSS,) * 2, grid=IMAGE)
def sana(grid: Grid, batch: int = 1) -> Case:
    """Sana: linear self-attention, so that only attention to the text is a softmax."""
    model = diffusers.SanaTransformer2DModel(
        **_config(
            patch_size=1,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM,
            cross_attention_dim=_INNER,
            caption_channels=16,
            sample_size=16,
        )
    )
    inputs = _inputs(grid, batch, encoder_attention_mask=prompt_mask(batch))
    return Case(randomized(model), {**inputs, "hidden_states": image(grid, 4, 1, batch)})


_COGVIEW = video(before=TEXT_LENGTH)


def _sizes(batch: int) -> dict[str, Any]:
    return {
        "original_size": torch.tensor([[64.0, 48.0]]).repeat(batch, 1),
        "target_size": torch.tensor([[64.0, 48.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


@builder("cogview 3+", "CogView", "CogView3PlusTransformer2DModel", (_COGVIEW,) * 2, grid=IMAGE)
def cogview_3(grid: Grid, batch: int = 1) -> Case:
    """CogView3-Plus: patches cut by reshapes, text in front."""
    model = diffusers.CogView3PlusTransformer2DModel(
        **_config(
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=16,
        )
    )
    return Case(randomized(model), _inputs(grid, batch, **_sizes(batch)))


@builder("cogview 4", "CogView", "CogView4Transformer2DModel", (_COGVIEW,) * 2, grid=IMAGE)
def cogview_4(grid: Grid, batch: int = 1) -> Case:
    """CogView4: padding of the text masked for queries and keys."""
    model = diffusers.CogView4Transformer2DModel(
        **_config(
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=16,
            rope_axes_dim=(16, 16),
        )
    )
    inputs = _inputs(grid, batch, attention_mask=prompt_mask(batch), **_sizes(batch))
    return Case(randomized(model), inputs)


@builder("glm image", "CogView", "GlmImageTransformer2DModel", (_COGVIEW,) * 2, grid=IMAGE)
def glm_image(grid: Grid, batch: int = 1) -> Case:
    """GLM-Image: tokens of a prior are added to those of the image."""
    model = diffusers.GlmImageTransformer2DModel(
        **_config(
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=11,
        )
    )
    length = torch.Size(grid).numel()
    sizes = _sizes(batch)
    del sizes["original_size"]
    inputs = _inputs(
        grid,
        batch,
        prior_token_id=torch.arange(length).repeat(batch, 1) % 11,
        prior_token_drop=torch.zeros(batch, length, dtype=torch.bool),
        **sizes,
    )
    return Case(randomized(model), inputs)


@builder("hunyuan dit", "HunyuanDiT", "HunyuanDiT2DModel", (VIDEO, CROSS) * 4, grid=IMAGE)
def hunyuan_dit(grid: Grid, batch: int = 1) -> Case:
    """HunyuanDiT: skip connections between its blocks."""
    model = diffusers.HunyuanDiT2DModel(
        **{k: v for k, v in _config(num_layers=4).items() if k != "out_channels"},
        sample_size=14,
        hidden_size=_INNER,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=5,
        mlp_ratio=2.0,
    )
    inputs = _inputs(
        grid,
        batch,
        encoder_hidden_states=text(batch, 16, 4),
        text_embedding_mask=prompt_mask(batch, 4),
        encoder_hidden_states_t5=text(batch, 16, 5),
        text_embedding_mask_t5=prompt_mask(batch, 5),
        image_meta_size=torch.randn(batch, 6),
        style=torch.zeros(batch, dtype=torch.long),
        image_rotary_emb=rotary(grid),
    )
    return Case(randomized(model), inputs)


@builder("lumina next", "Lumina", "LuminaNextDiT2DModel", (VIDEO, CROSS) * 2, grid=IMAGE)
def lumina_next(grid: Grid, batch: int = 1) -> Case:
    """Lumina-Next: fewer key heads than query heads, complex rotary table."""
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=_INNER,
        num_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=False,
        cross_attention_dim=16,
    )
    cosines, sines = rotary((12, 12))
    table = torch.complex(cosines, sines)[:, ::2].unflatten(0, (12, 12))
    inputs = _inputs(
        grid,
        batch,
        encoder_mask=prompt_mask(batch),
        image_rotary_emb=table,
        cross_attention_kwargs={},
    )
    return Case(randomized(model), inputs)


def _lumina2_sites(_grid: Grid, batch: int) -> Sites:
    # Each sample's image starts behind its own prompt; several samples share no layout.
    joint = video(before=TEXT_LENGTH - HIDDEN_TEXT) if batch == 1 else SEVERAL
    return (TEXT, VIDEO, joint)


@builder("lumina 2", "Lumina", "Lumina2Transformer2DModel", _lumina2_sites, grid=IMAGE)
def lumina_2(grid: Grid, batch: int = 1) -> Case:
    """Lumina 2: refiners over text and image, then both, packed sample by sample."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(16, 16, 16),
        cap_feat_dim=16,
    )
    inputs = _inputs(grid, batch, encoder_attention_mask=prompt_mask(batch).bool())
    return Case(randomized(model), inputs)


@builder("prx", "PRX", "PRXTransformer2DModel", (CROSS,) * 2, grid=IMAGE)
def prx(grid: Grid, batch: int = 1) -> Case:
    """PRX: queries of the image, keys of text and image."""
    model = diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=_INNER,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=2,
        axes_dim=[8, 8],
    )
    inputs = _inputs(grid, batch, attention_mask=prompt_mask(batch).bool())
    return Case(randomized(model), inputs)


_ERNIE = video(after=TEXT_LENGTH)


@builder("ernie image", "ERNIE", "ErnieImageTransformer2DModel", (_ERNIE,) * 2, grid=IMAGE)
def ernie_image(grid: Grid, batch: int = 1) -> Case:
    """ERNIE-Image: length first, then batch; text behind the image."""
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=_INNER,
        num_attention_heads=HEADS,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": image(grid, 4, 2, batch),
        "timestep": steps(batch),
        "text_bth": text(batch),
        "text_lens": prompt_mask(batch).sum(dim=1).long(),
        "return_dict": False,
    }
    return Case(randomized(model), inputs)
