"""Models that mask padded tokens, each in its own way, against the eager reference."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from modules import POLICY
from modules import assert_close
from modules import expected_output
from torch import Tensor
from torch import nn

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID = (3, 4, 5)
TEXT_LENGTH = 7
Case = tuple[nn.Module, dict[str, Any], cs.Text]


def _randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def _prompt(batch: int) -> dict[str, Any]:
    """Return the inputs of a prompt whose end is padding, more of it in each sample."""
    mask = torch.ones(batch, TEXT_LENGTH)
    for i in range(batch):
        mask[i, -2 - i :] = 0
    return {
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 16),
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


def _latents(batch: int, patch: int) -> Tensor:
    return torch.randn(batch, 4, GRID[0], GRID[1] * patch, GRID[2] * patch)


def hunyuan_video(batch: int) -> Case:
    """Lengths compared with positions, filled in."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=False,
        rope_axes_dim=(4, 6, 6),
    )
    pooled = {"pooled_projections": torch.randn(batch, 8)}
    inputs = {"hidden_states": _latents(batch, 2), **_prompt(batch), **pooled}
    return model, inputs, cs.Text(after=TEXT_LENGTH)


def hunyuan_video_15(batch: int) -> Case:
    """Padded in the processor, multiplied out over queries and keys."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": _latents(batch, 1),
        **_prompt(batch),
        "encoder_hidden_states_2": torch.randn(batch, 3, 12),
        "encoder_attention_mask_2": torch.ones(batch, 3),
        "image_embeds": torch.randn(batch, 2, 8),
    }
    return model, inputs, cs.Text(after=3 + 2 + TEXT_LENGTH)


def motif_video(batch: int) -> Case:
    """Padded with ones for the video."""
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    image = {"image_embeds": torch.randn(batch, 2, 8)}
    inputs = {"hidden_states": _latents(batch, 2), **_prompt(batch), **image}
    return model, inputs, cs.Text(after=2 + TEXT_LENGTH)


FAST = ("motif video",)
CASES = {
    "hunyuan video": (hunyuan_video, "key_padding"),
    "hunyuan video 1.5": (hunyuan_video_15, "query_and_key_padding"),
    "motif video": (motif_video, "key_padding"),
}


def _compiled(model: nn.Module, policy: Any) -> Any:
    options = {"policy": policy, "inner": "eager"}
    return torch.compile(model, backend="compiled_sparse", options=options)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_padded_tokens_are_hidden_as_the_model_says(name: str, batch: int) -> None:
    build, form = CASES[name]
    model, inputs, text = build(batch)
    _randomized(model)
    with torch.no_grad(), cs.metadata(grid_thw=GRID, text=text):
        report = cs.explain(model, policy=POLICY, **inputs)
        found = [site for site in report.sites if site.reason != "not_video"]
        assert [site.mask for site in found if site.is_sparse] == [form] * len(found), str(report)
        actual = _compiled(model, POLICY)(**inputs)[0]
        expected = expected_output(lambda: model(**inputs)[0], grid_thw=GRID, text=text)
        assert_close(actual, expected)
        assert (actual - model(**inputs)[0]).abs().max() > 1e-3 * expected.abs().max()
        other = {**inputs, "encoder_attention_mask": torch.ones(batch, TEXT_LENGTH)}
        assert (actual - _compiled(model, POLICY)(**other)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_dense_model_keeps_its_output_with_smaller_masks(name: str) -> None:
    model, inputs, _ = CASES[name][0](2)
    _randomized(model)
    with torch.no_grad():
        assert_close(_compiled(model, "dense")(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_padding_of_the_video_itself_is_known_in_allegro(batch: int) -> None:
    """The mask is pooled to tokens, made boolean, additive and spread over the heads."""
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        num_layers=1,
        cross_attention_dim=96,
        sample_height=2 * GRID[1],
        sample_width=2 * GRID[2],
        sample_frames=GRID[0],
        caption_channels=16,
    )
    _randomized(model)
    pixels = torch.ones(batch, GRID[0], 2 * GRID[1], 2 * GRID[2])
    pixels[:, -1] = 0
    angles = [torch.rand(2, extent, 16) for extent in GRID]
    places = torch.cartesian_prod(*(torch.arange(extent) for extent in GRID)).T
    inputs = {
        "hidden_states": _latents(batch, 2),
        **_prompt(batch),
        "attention_mask": pixels,
        "image_rotary_emb": (tuple(map(tuple, angles)), tuple(place[None] for place in places)),
    }
    with torch.no_grad():
        report = cs.explain(model, policy="dense", **inputs)
        assert [site.mask for site in report.sites] == ["key_padding", "other"]
        assert_close(_compiled(model, "dense")(**inputs)[0], model(**inputs)[0])
