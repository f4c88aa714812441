"""Models whose text or sound is as long as the video, so that lengths tell nothing apart."""

from __future__ import annotations

import torch

from builders.base import CROSS
from builders.base import IMAGE
from builders.base import TEXT
from builders.base import VIDEO
from builders.base import Case
from builders.base import Grid
from builders.base import Sites
from builders.base import builder
from builders.base import prompt_mask
from builders.base import text
from builders.base import video
from builders.cogvideox import cogvideox_5b
from builders.flux import flux
from builders.flux import flux_3
from builders.flux import qwen_image
from builders.hunyuan import hunyuan_video
from builders.ltx import ltx
from builders.ltx import ltx_2
from builders.volume import kandinsky_6
from builders.wan import wan


def _length(grid: Grid) -> int:
    return torch.Size(grid).numel()


def _with_long_text(case: Case, grid: Grid, batch: int) -> Case:
    length = _length(grid)
    inputs = {**case.inputs, "encoder_hidden_states": text(batch, length=length)}
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][:1].repeat(length, 1)
    for name in ("encoder_attention_mask", "encoder_hidden_states_mask"):
        if name in inputs:
            inputs[name] = prompt_mask(batch, length).to(inputs[name].dtype)
    return Case(case.model, inputs)


def _before(grid: Grid, _batch: int) -> Sites:
    return (video(before=_length(grid)),) * 2


def _after(grid: Grid, _batch: int) -> Sites:
    return (TEXT, *(video(after=_length(grid)),) * 2)


@builder("wan, text as long", "Wan", "WanTransformer3DModel", (VIDEO, CROSS) * 2)
def wan_twin(grid: Grid, batch: int = 1) -> Case:
    """Wan: cross-attention between equal lengths."""
    return _with_long_text(wan(grid, batch), grid, batch)


@builder("hunyuan video, text as long", "HunyuanVideo", "HunyuanVideoTransformer3DModel", _after)
def hunyuan_twin(grid: Grid, batch: int = 1) -> Case:
    """HunyuanVideo: refiner of the text over as many tokens as the video has."""
    return _with_long_text(hunyuan_video(grid, batch), grid, batch)


@builder(
    "cogvideox 5b, text as long",
    "CogVideoX",
    "CogVideoXTransformer3DModel",
    _before,
    axes=(1, 3, 4),
)
def cogvideox_twin(grid: Grid, batch: int = 1) -> Case:
    """CogVideoX: the first half is text."""
    return _with_long_text(cogvideox_5b(grid, batch), grid, batch)


@builder("flux, text as long", "Flux", "FluxTransformer2DModel", _before, grid=IMAGE, axes=())
def flux_twin(grid: Grid, batch: int = 1) -> Case:
    """Flux.1: the first half is text."""
    return _with_long_text(flux(grid, batch), grid, batch)


def _flux_3_sites(grid: Grid, _batch: int) -> Sites:
    return (TEXT, VIDEO, video(before=_length(grid)))


@builder(
    "flux 3, text as long", "Flux", "Flux3Transformer2DModel", _flux_3_sites, grid=IMAGE, axes=()
)
def flux_3_twin(grid: Grid, batch: int = 1) -> Case:
    """Flux.3: text alone and image alone, equally long."""
    return _with_long_text(flux_3(grid, batch), grid, batch)


@builder(
    "qwen image, text as long",
    "QwenImage",
    "QwenImageTransformer2DModel",
    _before,
    grid=IMAGE,
    axes=(),
)
def qwen_image_twin(grid: Grid, batch: int = 1) -> Case:
    """Qwen-Image: the first half is text."""
    return _with_long_text(qwen_image(grid, batch), grid, batch)


@builder("ltx, text as long", "LTX", "LTXVideoTransformer3DModel", (VIDEO, CROSS) * 2, axes=())
def ltx_twin(grid: Grid, batch: int = 1) -> Case:
    """LTX-Video: cross-attention between equal lengths."""
    return _with_long_text(ltx(grid, batch), grid, batch)


@builder(
    "ltx 2, sound as long",
    "LTX",
    "LTX2VideoTransformer3DModel",
    (VIDEO, TEXT, CROSS, CROSS, CROSS, CROSS) * 2,
    axes=(),
)
def ltx_2_twin(grid: Grid, batch: int = 1) -> Case:
    """LTX-2: video and sound have equally many tokens, and attend each other."""
    case, length = ltx_2(grid, batch), _length(grid)
    sound = {"audio_hidden_states": text(batch, 4, length), "audio_num_frames": length}
    return Case(case.model, {**case.inputs, **sound})


@builder(
    "kandinsky 6, sound as long",
    "Kandinsky",
    "Kandinsky6Transformer3DModel",
    (TEXT, TEXT, *(VIDEO, CROSS, TEXT, CROSS, CROSS, CROSS) * 2),
    axes=(1, 2, 3),
)
def kandinsky_6_twin(grid: Grid, batch: int = 1) -> Case:
    """Kandinsky 6: video and sound have equally many tokens."""
    case = kandinsky_6(grid, batch)
    return Case(case.model, {**case.inputs, "audio_hidden_states": text(batch, 4, _length(grid))})
