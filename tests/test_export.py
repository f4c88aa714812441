"""Exported programs: rewritten by the same pass, run, saved and loaded, or refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import GRID
from modules import POLICY
from modules import Attention
from modules import Tiny
from modules import TinyDiT
from modules import assert_close
from modules import dit_inputs
from modules import expected_output
from modules import raster
from modules import tokens
from modules import video
from torch import Tensor
from torch import nn
from torch.export import Dim

import compiled_sparse as cs
from compiled_sparse.errors import ExportError
from compiled_sparse.report import Report

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SPARSE_OP = torch.ops.compiled_sparse.sta.default


def exported(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    return torch.export.export(model.requires_grad_(False), inputs, **options)


def outcomes(report: Report) -> list[str]:
    return [site.reason or site.decision for site in report.sites]


def test_an_exported_model_computes_what_the_reference_says_and_keeps_its_original() -> None:
    model, inputs = TinyDiT(2), dit_inputs()
    original = exported(model, *inputs)
    code = original.graph_module.code
    program, report = cs.rewrite_exported(original, POLICY)
    assert outcomes(report) == ["sparse", "cross_attention"] * 2
    assert [site.path for site in report.sites][:2] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert_close(program.module()(*inputs), expected_output(model, *inputs))
    assert original.graph_module.code == code
    assert_close(original.module()(*inputs), model(*inputs))


def test_it_decides_as_the_backend_does() -> None:
    model, inputs = TinyDiT(2), dit_inputs()
    policy = cs.Policy({"blocks.1.*": POLICY, "*": "dense"})
    report = cs.rewrite_exported(exported(model, *inputs), policy).report
    assert report.sites == cs.explain(model, *inputs, policy=policy).sites
    with cs.force("dense"):
        assert cs.rewrite_exported(exported(model, *inputs), policy).report.num_sparse == 0


def test_a_rewritten_program_can_be_saved_loaded_and_compiled() -> None:
    model, inputs = TinyDiT(1), dit_inputs()
    program, _ = cs.rewrite_exported(exported(model, *inputs), POLICY)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    expected = expected_output(model, *inputs)
    assert_close(loaded.module()(*inputs), expected)
    compiled = torch.compile(loaded.module(), backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), expected)


def test_open_sizes_stay_open() -> None:
    model, inputs = TinyDiT(1), dit_inputs()
    axes = {2: Dim("frames"), 3: 2 * Dim("rows"), 4: 2 * Dim("columns")}
    shapes = {"video": axes, "text": None, "step": None}
    program, report = cs.rewrite_exported(
        exported(model, *inputs, dynamic_shapes=shapes, strict=False), POLICY
    )
    assert report.sites[0].is_sparse
    assert report.sites[0].dynamic
    for grid in (GRID, (5, 7, 6), (2, 3, 7)):
        inputs = dit_inputs(grid)
        expected = expected_output(model, *inputs, grid_thw=grid)
        assert_close(program.module()(*inputs), expected)


def test_a_tile_chosen_by_an_open_grid_is_refused() -> None:
    model, inputs = TinyDiT(1), dit_inputs()
    shapes = {"video": {2: Dim("frames")}, "text": None, "step": None}
    program = exported(model, *inputs, dynamic_shapes=shapes, strict=False)
    with pytest.raises(ExportError, match="would be fixed"):
        cs.rewrite_exported(program, cs.STA(window_thw=(1, 1, 1), tile_thw="auto"))


def test_text_and_key_padding_are_followed_through_the_operations_of_export() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([raster(x), text], 1)
        return m.attn(x, attn_mask=mask)[:, :60]

    model = Tiny(body)
    mask = (torch.arange(67) < 64)[None, None, None].expand(2, 1, 1, 67).contiguous()
    inputs = (video(2), tokens(2, 7), mask)
    program, report = cs.rewrite_exported(exported(model, *inputs), POLICY)
    assert outcomes(report) == ["sparse"]
    expected = expected_output(model, *inputs, text=cs.Text(after=7))
    assert_close(program.module()(*inputs), expected)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs": lambda valid: valid[:, None, :, None] & valid[:, None, None, :],
    "additive": lambda valid: ((1 - valid.to(torch.float32)) * -10000.0)[:, None, None, :],
    "expanded": lambda valid: valid[:, None, None].expand(2, 2, 67, 67),
}


@pytest.mark.parametrize("policy", [POLICY, "dense"], ids=["sparse", "dense"])
@pytest.mark.parametrize("form", MASKS)
def test_masks_made_in_the_program_are_recognised(form: str, policy: Any) -> None:
    def body(m: Tiny, x: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        x = torch.cat([raster(x), text], 1)
        return m.attn(x, attn_mask=MASKS[form](valid))[:, :60]

    model = Tiny(body)
    inputs = (video(2), tokens(2, 7), (torch.arange(67) < 64).expand(2, 67).contiguous())
    program, report = cs.rewrite_exported(exported(model, *inputs), policy)
    assert report.sites[0].mask == ("query_and_key_padding" if form == "pairs" else "key_padding")
    assert report.num_sparse == (policy is POLICY)
    text = cs.Text(after=7)
    expected = model(*inputs) if policy == "dense" else expected_output(model, *inputs, text=text)
    assert_close(program.module()(*inputs), expected)


def test_a_sliced_video_is_not_taken_for_the_whole() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x)[:, 5:]))
    report = cs.rewrite_exported(exported(model, video()), POLICY).report
    assert report.num_sparse == 0
    model = Tiny(lambda m, x: m.attn(torch.cat([m.registers, raster(x)], 1)[:, 4:]))
    program, report = cs.rewrite_exported(exported(model, x := video()), POLICY)
    assert report.num_sparse == 1
    assert_close(program.module()(x), expected_output(model, x))


class Bare(nn.Module):
    """A program that returns what attention returns."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_call_that_is_the_programs_output_is_still_its_output() -> None:
    x = torch.randn(1, 2, 60, 8)
    with cs.metadata(grid_thw=GRID):
        rewritten, report = cs.rewrite_exported(exported(Bare(), x), POLICY)
    assert outcomes(report) == ["sparse"]
    assert_close(rewritten.module()(x), cs.attention(x, x, x, POLICY, grid_thw=GRID))


def _halves_swapped(m: Tiny, x: Tensor) -> Tensor:
    x = raster(x)
    out = torch.empty_like(x)
    out[:, :30] = x[:, 30:]
    out[:, 30:] = x[:, :30]
    return m.attn(out)


def _written_over(m: Tiny, x: Tensor) -> Tensor:
    x = raster(x).clone()
    x[:, 10:20] = x[:, 20:30]
    return m.attn(x)


def _slice_of_a_slice(m: Tiny, x: Tensor) -> Tensor:
    x = raster(x).clone()
    x[:, 5:40][:, 3:9] = x[:, 20:26]
    return m.attn(x)


def _without_gradients(m: Tiny, x: Tensor) -> Tensor:
    tokens = raster(x).clone()
    with torch.no_grad():
        tokens[:, :30] = tokens[:, 30:].clone()
    return m.attn(tokens)


def _under_autocast(m: Tiny, x: Tensor) -> Tensor:
    tokens = raster(x).clone()
    with torch.autocast("cpu", torch.bfloat16):
        tokens[:, :30] = tokens[:, 30:].clone()
    return m.attn(tokens)


def _shape_hidden(m: Tiny, x: Tensor) -> Tensor:
    x = raster(x).clone()
    x.copy_(x.flip(1))
    return m.attn(x)


@pytest.mark.parametrize(
    "body",
    [
        _halves_swapped,
        _written_over,
        _slice_of_a_slice,
        _shape_hidden,
        _without_gradients,
        _under_autocast,
    ],
)
def test_tokens_written_to_other_places_are_not_taken_for_the_video(body: Any) -> None:
    report = cs.rewrite_exported(exported(Tiny(body), video()), POLICY).report
    assert report.num_sparse == 0
    assert {site.reason for site in report.sites} <= {"layout_unknown", "not_video"}


@pytest.mark.parametrize("dim", [1, 2], ids=["tokens", "channels"])
def test_tokens_written_where_they_belong_are_followed(dim: int) -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x)
        out = torch.empty_like(x)
        if dim == 1:
            out.copy_(x * 2)
        else:
            out[..., ::2] = x[..., 1::2]
            out[..., 1::2] = x[..., ::2]
        return m.attn(out)

    model, x = Tiny(body), video()
    program, report = cs.rewrite_exported(exported(model, x), POLICY)
    assert outcomes(report) == ["sparse"]
    assert_close(program.module()(x), expected_output(model, x))


def test_metadata_gives_a_layout_the_graph_does_not_show() -> None:
    attn, x = Attention(), tokens()
    program = exported(attn, x)
    assert outcomes(cs.rewrite_exported(program, POLICY).report) == ["layout_unknown"]
    with cs.metadata(grid_thw=GRID):
        rewritten, report = cs.rewrite_exported(program, POLICY)
    assert outcomes(report) == ["sparse"]
    assert_close(rewritten.module()(x), expected_output(attn, x))


def test_what_only_a_call_can_say_is_refused() -> None:
    program = exported(TinyDiT(1), *dit_inputs())
    with pytest.raises(ExportError, match="knows no denoising steps"):
        cs.rewrite_exported(program, cs.Policy({"*": POLICY}, dense_first_steps=1))
    table = cs.WindowTable(windows=((1, 1, 1), (3, 3, 3)), choice=(((0,),), ((1,),)))
    with pytest.raises(ExportError, match="handed no values of the call"):
        cs.rewrite_exported(program, cs.STA(window_thw=table, tile_thw=(2, 3, 2)))


def test_a_wan_transformer_is_exported_and_rewritten() -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96, text_dim=32
    ).eval()
    inputs = (torch.randn(1, 16, 3, 8, 10), torch.tensor([500]), torch.randn(1, 20, 32))
    program, report = cs.rewrite_exported(exported(model, *inputs), POLICY)
    assert outcomes(report) == ["sparse", "cross_attention"] * 2
    assert {site.grid_thw for site in report.sites if site.is_sparse} == {GRID}
    (actual,) = program.module()(*inputs).values()
    assert_close(actual, expected_output(model, *inputs).sample)
