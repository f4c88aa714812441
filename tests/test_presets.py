"""Geometries of published models, held against the classes of diffusers and torch's FLOPs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compiled_sparse import errors
from compiled_sparse.geometry import ModelGeometry
from compiled_sparse.geometry import whole_gain
from compiled_sparse.presets import MODELS
from compiled_sparse.presets import geometry

WAN, LTX = geometry("wan2.1-t2v-14b"), geometry("ltx-video")
BY_CLASS = {model.class_name: model for model in MODELS.values() if "layers" in model.defaults}


def build(model: ModelGeometry, **arguments: Any) -> torch.nn.Module:
    """The model's class with its defaults, on no device."""
    with torch.device("meta"):
        built: torch.nn.Module = getattr(diffusers, model.class_name)(**arguments)
    return built


def class_defaults(model: ModelGeometry) -> dict[str, Any]:
    signature = inspect.signature(getattr(diffusers, model.class_name).__init__)
    return {name: each.default for name, each in signature.parameters.items()}


def in_fields(model: ModelGeometry) -> dict[str, Any]:
    """What the defaults of a class say, in the fields of a geometry."""
    given = class_defaults(model)
    heads, head_dim = given["num_attention_heads"], given["attention_head_dim"]
    patch = given["patch_size"]
    hidden = int(given.get("mlp_ratio", 4) * heads * head_dim)
    if model.ffn_matrices == 3:  # gated: two thirds, as `MochiTransformerBlock` has it
        hidden = 2 * hidden // 3
    found = {
        "layers": given["num_layers"] + given.get("num_single_layers", 0),
        "heads": heads,
        "head_dim": head_dim,
        "ffn_dim": given.get("ffn_dim", hidden),
        "patch_thw": patch
        if isinstance(patch, tuple)
        else (given.get("patch_size_t") or 1, patch, patch),
        "text": given.get("max_text_seq_length", given.get("max_sequence_length")),
    }
    if "sample_frames" in given:
        found["size"] = (
            given["sample_frames"],
            model.vae_thw[1] * given["sample_height"],
            model.vae_thw[2] * given["sample_width"],
        )
    return found


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_a_preset_calls_a_default_is_the_default_of_its_class(model: ModelGeometry) -> None:
    assert model.defaults
    found = in_fields(model)
    for field in model.defaults:
        value = getattr(model, field)
        if field == "text":
            value = value.before + value.after
        if field == "size":
            value = (value.frames, value.height, value.width)
        assert value == found[field], field


def met_by_video(name: str) -> bool:
    """Whether a weight of a block is multiplied with every token of the video."""
    of_text = re.search(r"context|add_|attn2\.to_[kv]$", name)
    return of_text is None and "norm" not in name


@pytest.mark.parametrize("model", BY_CLASS.values(), ids=BY_CLASS)
def test_the_weights_of_a_block_are_those_of_the_class(model: ModelGeometry) -> None:
    transformer = build(model, num_layers=1)
    is_wan = model.class_name == WAN.class_name
    block = transformer.get_submodule("blocks.0" if is_wan else "transformer_blocks.0")
    weights = {
        name: each.weight.numel()
        for name, each in block.named_modules()
        if isinstance(each, torch.nn.Linear) and met_by_video(name)
    }
    assert sum(weights.values()) == model.block_parameters, weights


def forward_flops(model: ModelGeometry, inputs: dict[str, Any], layers: int) -> int:
    transformer = build(model, num_layers=layers)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(**inputs, return_dict=False)
    return counter.get_total_flops()


def wan_inputs(grid: tuple[int, int, int]) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": torch.empty(1, 16, frames, 2 * height, 2 * width, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, WAN.cross_tokens, 4096, device="meta"),
    }


def ltx_inputs(grid: tuple[int, int, int]) -> dict[str, Any]:
    frames, height, width = grid
    tokens = frames * height * width
    return {
        "hidden_states": torch.empty(1, tokens, 128, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, LTX.cross_tokens, 4096, device="meta"),
        "encoder_attention_mask": None,
        "num_frames": frames,
        "height": height,
        "width": width,
    }


@pytest.mark.parametrize(
    ("model", "inputs"), [(WAN, wan_inputs), (LTX, ltx_inputs)], ids=["wan", "ltx"]
)
def test_the_flops_of_a_block_are_those_that_torch_counts(
    model: ModelGeometry, inputs: Any
) -> None:
    grid = model.grid_thw(*((9, 480, 832) if model is WAN else (None, None, None)))
    one, two = (forward_flops(model, inputs(grid), layers) for layers in (1, 2))
    predicted = (model.attention_flops(grid) + model.other_flops(grid)) / model.layers
    # Left out are keys and values of the text and the modulation, which are no work per token.
    assert predicted == pytest.approx(two - one, rel=0.03)
    assert predicted <= two - one


def test_the_usual_videos_have_the_grids_that_papers_name() -> None:
    assert geometry("wan2.1-t2v-1.3b").grid_thw() == (21, 30, 52)
    assert WAN.grid_thw(81, 720, 1280) == (21, 45, 80)
    assert WAN.num_tokens(WAN.grid_thw()) == 75600
    assert geometry("wan2.2-ti2v-5b").grid_thw() == (31, 22, 40)
    assert geometry("HunyuanVideo").grid_thw() == (33, 45, 80)
    assert geometry("hunyuanvideo").num_tokens((33, 45, 80)) == 119056
    assert geometry("cogvideox-5b").grid_thw() == (13, 30, 45)
    assert geometry("cogvideox1.5-5b").grid_thw() == (11, 48, 85)  # 21 latents, padded to 22
    assert LTX.grid_thw() == (21, 16, 22)
    assert geometry("mochi-1").grid_thw() == (28, 30, 53)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((80, 480, 832), "frames=77 or 81"),
        ((0, 480, 832), "frames=1"),
        ((81, 481, 832), "height=480 or 496"),
        ((81, 5, 832), "height=16"),
        ((81, 480, 831), "width=816 or 832"),
    ],
)
def test_a_size_that_has_no_grid_is_told_the_nearest_that_have(
    size: tuple[int, int, int], nearest: str
) -> None:
    with pytest.raises(errors.LayoutError) as caught:
        WAN.grid_thw(*size)
    assert caught.value.next_step.endswith(f": {nearest}")
    name, _, numbers = nearest.partition("=")
    for number in map(int, numbers.split(" or ")):
        sizes = dict(zip(("frames", "height", "width"), size, strict=True)) | {name: number}
        assert WAN.grid_thw(**sizes)


def test_attention_is_the_larger_share_the_longer_the_video() -> None:
    shares = [WAN.attention_share(WAN.grid_thw(frames)) for frames in (1, 33, 81)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.2
    assert shares[-1] > 0.7


def test_the_gain_of_the_whole_is_bounded_by_the_rest() -> None:
    assert whole_gain(0.5, 1e9) == pytest.approx(2.0)
    assert whole_gain(1.0, 8.0) == pytest.approx(8.0)
    assert whole_gain(0.8, 0.5) < 1.0
