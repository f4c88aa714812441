"""Which graphs prove a layout, rule family by rule family, and which do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import LENGTH
from modules import Tiny
from modules import assert_close
from modules import assert_rewritten
from modules import assert_untouched
from modules import expected_output
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor
from torch import nn

import compiled_sparse as cs

Flatten = Callable[[Tensor], Tensor]

FLATTENED: dict[str, Flatten] = {
    "flatten": lambda x: x.flatten(2).transpose(1, 2),
    "flatten by name": lambda x: torch.flatten(input=x, start_dim=2).transpose(dim0=-1, dim1=-2),
    "permute": lambda x: x.permute(0, 2, 3, 4, 1).reshape(1, LENGTH, 16),
    "permute of a list": lambda x: torch.permute(x, [0, 2, 3, 4, 1]).flatten(1, 3),
    "view": lambda x: x.view(1, 16, -1).swapaxes(1, -1).contiguous(),
    "in two steps": lambda x: x.flatten(3).flatten(2).transpose(1, 2),
    "unflatten": lambda x: raster(x).unflatten(1, GRID).flatten(1, 3),
    "unsqueeze and squeeze": lambda x: raster(x).unsqueeze(1).unsqueeze(-1).squeeze(-1).squeeze(1),
    "view and merge axes": lambda x: raster(x).view(1, 12, 5, 16).flatten(1, 2),
    "there and back": lambda x: (
        raster(x).view(1, 3, 20, 16).permute(0, 2, 1, 3).permute(0, 2, 1, 3).flatten(1, 2)
    ),
    "frames one by one": lambda x: torch.cat(
        [f.flatten(2) for f in x[:, :, None].unbind(2)], 2
    ).transpose(1, 2),
    "einops": lambda x: einops.rearrange(x, "b c t h w -> b (t h w) c"),
    "chunk of channels": lambda x: torch.cat(raster(x).chunk(2, -1), -1),
    "slice of everything": lambda x: raster(x)[:, :LENGTH][..., :][0][None],
    "expand": lambda x: raster(x).expand(1, -1, -1),
    "norms": lambda x: F.normalize(F.layer_norm(raster(x), (16,)), dim=-1) * 3,
    "hand-written norm": lambda x: raster(x) * (raster(x).pow(2).mean(-1, keepdim=True)).rsqrt(),
    "positional norm": lambda x: raster(x) / raster(x).norm(2, 1, True) * 3,
    "where": lambda x: torch.where(raster(x) > 0, raster(x), 0.1),
    "cast": lambda x: raster(x).double().float(),
    "matrix of channels": lambda x: raster(x) @ torch.eye(16).flip(0),
    "in-place sum": lambda x: raster(x).clone().add_(1.0).mul_(2.0),
}


@pytest.mark.parametrize("flatten", FLATTENED.values(), ids=FLATTENED)
def test_tokens_in_raster_order_are_recognised(flatten: Flatten) -> None:
    assert_rewritten(Tiny(lambda m, x: m.attn(flatten(x))).requires_grad_(False), video())


UNPROVEN: dict[str, Flatten] = {
    "height and width swapped": lambda x: x.permute(0, 2, 4, 3, 1).reshape(1, LENGTH, 16),
    "time and height swapped": lambda x: x.permute(0, 3, 2, 4, 1).reshape(1, LENGTH, 16),
    "all axes backwards": lambda x: x.permute(0, 4, 3, 2, 1).reshape(1, LENGTH, 16),
    "einops in another order": lambda x: einops.rearrange(x, "b c t h w -> b (t w h) c"),
    "channels inside": lambda x: x.permute(0, 2, 1, 3, 4).reshape(1, LENGTH, 16),
    "channels first": lambda x: x.reshape(1, LENGTH, 16),
    "cropped tokens": lambda x: raster(x)[:, :48],
    "cropped frames": lambda x: raster(x[:, :, :2]),
    "every other frame": lambda x: raster(x[:, :, ::2]),
    "frame dropped inside": lambda x: raster(torch.cat([x[:, :, :1], x[:, :, 2:]], 2)),
    "padded": lambda x: F.pad(raster(x), (0, 0, 0, 4)),
    "windows": lambda x: x.view(1, 16, 3, 2, 2, 5).permute(0, 3, 2, 4, 5, 1).reshape(2, 30, 16),
    "shifted grid": lambda x: raster(x.roll((1, 1, 1), (2, 3, 4))),
    "pooled and resized": lambda x: raster(F.interpolate(F.avg_pool3d(x, 2, 1), GRID)),
    "pixels shuffled": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x[..., :4], 2), 2).flatten(2).mT,
}


@pytest.mark.parametrize("flatten", UNPROVEN.values(), ids=UNPROVEN)
def test_tokens_in_another_order_are_left_alone(flatten: Flatten) -> None:
    model = Tiny(lambda m, x: m.attn(flatten(x))).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


def test_the_batch_folded_into_the_sequence_is_left_alone() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x).reshape(1, -1, 16)))
    assert_untouched(model, video(batch=2), reason="layout_unknown")


def test_spatial_and_temporal_attention_are_partial_grids() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        spatial = m.attn(x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2))
        temporal = m.attn(x.permute(0, 3, 4, 2, 1).flatten(0, 2))
        return spatial.sum() + temporal.sum()

    backend = assert_untouched(Tiny(body), video(batch=2), reason="partial_grid", calls=2)
    assert [d.detail.split()[2] for d in backend.decisions] == ["HW", "T"]


def test_one_frame_is_a_grid_and_its_spatial_attention_is_whole() -> None:
    model = Tiny(lambda m, x: m.attn(x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)))
    assert_rewritten(model, video(2, (1, 7, 6)), grid_thw=(1, 7, 6))


def test_a_grid_that_no_tile_divides_and_a_batch_are_right() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x)))
    assert_rewritten(model, video(2, (5, 7, 6)), grid_thw=(5, 7, 6))


@pytest.mark.parametrize(("before", "after"), [(7, 0), (0, 7), (7, 14)])
def test_text_before_and_after_the_video_is_counted(before: int, after: int) -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        parts = [text] * (before // 7) + [raster(x)] + [text] * (after // 7)
        return m.attn(torch.cat(parts, 1))

    text = cs.Text(before=before, after=after)
    backend = assert_rewritten(Tiny(body), video(), tokens(1, 7), text=text)
    (decision,) = backend.decisions
    assert (decision.kind, decision.text_before, decision.text_after) == ("joint", before, after)


def test_streams_joined_after_their_projections_are_followed_and_split_again() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        x = raster(x)
        for _ in range(2):
            both = m.attn(torch.cat([x, text], dim=1))
            dx, dtext = both.split([x.shape[1], text.shape[1]], dim=1)
            x, text = x + dx, text + dtext
        both = torch.cat((x, text), -2)
        x, text = both[:, : -text.shape[1]], both[:, -text.shape[1] :]
        return m.attn(torch.cat([text, x], 1))

    model, inputs = Tiny(body), (video(), tokens(1, 7))
    backend, actual = record(model, *inputs)
    assert backend.outcomes == ["sparse"] * 3
    assert [(d.text_before, d.text_after) for d in backend.decisions] == [(0, 7), (0, 7), (7, 0)]
    assert actual.shape == (1, 67, 16)


def test_learned_tokens_beside_the_video_are_text() -> None:
    model = Tiny(lambda m, x: m.attn(torch.cat([m.registers, raster(x)], 1)))
    assert_rewritten(model, video(), text=cs.Text(before=4))


def test_learned_tokens_that_differ_between_queries_and_keys_are_not_the_same_text() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x, other = raster(x), m.registers.flip(1)
        return m.attn(torch.cat([m.registers, x], 1), torch.cat([other, x], 1))

    assert_untouched(Tiny(body), video(), reason="layout_unknown")


def test_an_empty_text_changes_nothing() -> None:
    model = Tiny(lambda m, x, t: m.attn(torch.cat([t, raster(x), t.new_zeros(1, 0, 16)], 1)))
    assert_rewritten(model, video(), tokens(1, 0))


def _rope_by_assignment(x: Tensor) -> Tensor:
    angles = torch.arange(LENGTH)[None, :, None, None] * torch.ones(4)
    cos, sin = angles.cos(), angles.sin()
    out = torch.empty_like(x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


def _rope_by_complex_numbers(x: Tensor) -> Tensor:
    angles = torch.arange(LENGTH)[:, None, None] * torch.ones(4)
    rotation = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(3)


def _rope_by_halves(x: Tensor) -> Tensor:
    angles = torch.arange(LENGTH)[:, None, None] * torch.ones(8)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def _rope_by_stacking(x: Tensor) -> Tensor:
    angles = torch.arange(LENGTH)[:, None, None] * torch.ones(8)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * angles.cos() + torch.stack([-imaginary, real], dim=-1).flatten(3) * angles.sin()


@pytest.mark.parametrize(
    "rope",
    [_rope_by_assignment, _rope_by_complex_numbers, _rope_by_halves, _rope_by_stacking],
)
def test_rotary_embeddings_keep_the_layout(rope: Flatten) -> None:
    assert_rewritten(Tiny(lambda m, x: m.attn(raster(x), edit=rope)).requires_grad_(False), video())


def test_rotary_embeddings_of_the_video_part_alone_keep_the_layout() -> None:
    def edit(x: Tensor) -> Tensor:
        return torch.cat([_rope_by_halves(x[:, :LENGTH]), x[:, LENGTH:]], 1)

    model = Tiny(lambda m, x, t: m.attn(torch.cat([raster(x), t], 1), edit=edit))
    assert_rewritten(model, video(), tokens(1, 7), text=cs.Text(after=7))


def test_residuals_feed_forward_and_modulation_keep_the_layout() -> None:
    def body(m: Tiny, x: Tensor, step: Tensor) -> Tensor:
        x = raster(x) + m.position
        for _ in range(2):
            shift, scale = m.attn.to_q(step).unsqueeze(1).chunk(2, dim=-1)
            shift, scale = shift.repeat(1, 1, 2), scale.repeat(1, 1, 2)
            x = x + m.attn(F.layer_norm(x, (16,)) * (1 + scale) + shift)
            x = x + m.attn.to_k(F.gelu(m.attn.to_v(x))) * (1 + x.mean(1, keepdim=True))
        return m.attn(x)

    model, inputs = Tiny(body), (video(), torch.randn(1, 16))
    backend, actual = record(model, *inputs)
    assert backend.outcomes == ["sparse"] * 3
    assert_close(actual, expected_output(model, *inputs))


def test_partly_rotated_heads_of_tokens_from_outside_stay_the_same_tokens() -> None:
    attn = Tiny(lambda m: m).attn

    def model(x: Tensor, angles: Tensor) -> Tensor:
        def edit(heads: Tensor) -> Tensor:
            return torch.cat([heads[..., :4] * angles, heads[..., 4:]], -1)

        return attn(x, edit=edit)

    inputs = (tokens(), torch.randn(1, LENGTH, 1, 4))
    backend, actual = record(model, *inputs, grid_thw=GRID)
    assert backend.outcomes == ["sparse"]
    assert_close(actual, expected_output(model, *inputs))


# More than one sequence.


def test_text_of_the_same_length_is_cross_attention_in_both_directions() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        return m.attn(raster(x), text) + m.attn(text, raster(x))

    model, inputs = Tiny(body), (video(), tokens())
    assert_untouched(model, *inputs, reason="cross_attention", calls=2)
    assert_untouched(model, *inputs, reason="cross_attention", calls=2, grid_thw=GRID)


def test_learned_positions_shared_by_video_and_text_do_not_make_them_one() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        return m.attn(raster(x) + m.position, text + m.position)

    model, inputs = Tiny(body), (video(), tokens())
    assert_untouched(model, *inputs, reason="cross_attention")
    assert_untouched(model, *inputs, reason="cross_attention", grid_thw=GRID)


def test_positions_given_as_an_input_do_not_make_two_sequences_one() -> None:
    attn = Tiny(lambda m: m).attn

    def cross(x: Tensor, context: Tensor, positions: Tensor) -> Tensor:
        return attn(x * positions, context * positions)

    inputs = (tokens(), tokens(), tokens())
    assert_untouched(cross, *inputs, reason="layout_unknown", grid_thw=GRID)


def test_a_text_refiner_is_not_video_even_if_metadata_fits_its_length() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        return m.attn(m.attn(text)) + raster(x)

    model, inputs = Tiny(body), (video(), tokens())
    assert_untouched(model, *inputs, reason="not_video", calls=2)
    assert_untouched(model, *inputs, reason="not_video", calls=2, grid_thw=GRID)


def test_a_text_refiner_that_runs_before_the_patch_embedding_is_not_video() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny(lambda m, x: raster(x))

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            text = self.tiny.attn(text)
            return text + self.tiny(x)

    inputs = (video(), tokens())
    assert_untouched(Early(), *inputs, reason="not_video")
    assert_untouched(Early(), *inputs, reason="not_video", grid_thw=GRID)


def test_learned_tokens_alone_are_not_video() -> None:
    model = Tiny(lambda m, x: m.attn(m.position) + raster(x))
    assert_untouched(model, video(), reason="not_video")


def test_two_videos_in_one_sequence_are_several_grids() -> None:
    def body(m: Tiny, x: Tensor, y: Tensor) -> Tensor:
        x, y = raster(x), raster(m.patch(y))
        return m.attn(torch.cat([x, y], 1)) + m.attn(torch.cat([x, x], 1))

    assert_untouched(Tiny(body), video(), video(), reason="several_grids", calls=2)


def test_videos_of_one_length_on_two_grids_are_never_one_layout() -> None:
    def body(m: Tiny, x: Tensor, y: Tensor) -> Tensor:
        x, y = raster(x), raster(m.patch(y))
        return m.attn(x, y) + m.attn(y, x) + m.attn(x + y)

    inputs = (video(), video(grid=(4, 3, 5)))
    assert_untouched(Tiny(body), *inputs, reason="layout_unknown", calls=3)


def test_a_control_video_added_on_the_same_grid_keeps_the_layout() -> None:
    model = Tiny(lambda m, x, y: m.attn(raster(x) + raster(m.patch(y))))
    assert_rewritten(model, video(), video())


def test_two_videos_on_the_same_grid_are_still_not_the_same_tokens() -> None:
    model = Tiny(lambda m, x, y: m.attn(raster(x), raster(m.patch(y))))
    assert_untouched(model, video(), video(), reason="layout_unknown")


def test_reshapes_into_other_factors_do_not_share_a_name() -> None:
    attn = Tiny(lambda m: m).attn

    def model(x: Tensor) -> Tensor:
        x = x * 2
        by_ten = x.view(1, 10, 6, 16).transpose(1, 2).flatten(1, 2)
        by_six = x.view(1, 6, 10, 16).transpose(1, 2).flatten(1, 2)
        return attn(by_ten, by_six)

    assert_untouched(model, tokens(), reason="layout_unknown", grid_thw=GRID)


# Functions that are not what their name says.

LIBRARY = torch.library.Library("compiled_sparse_tests", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compiled_sparse_tests::{name}", fake, lib=LIBRARY)


def _reverse_in_place(x: Tensor) -> None:
    x.copy_(x.flip(1))


_define("mul(Tensor x) -> Tensor", lambda x: x.flip(1), torch.empty_like)
_define("fill(Tensor(a!) x) -> ()", _reverse_in_place, lambda x: None)


@torch.compiler.allow_in_graph
def relu(x: Tensor) -> Tensor:
    """Move tokens under the name of a function that does not."""
    return x.flip(1)


@torch.compiler.allow_in_graph
def total(x: Tensor) -> Tensor:
    """Move tokens without returning them."""
    x.copy_(x.flip(1))
    return x.sum()


def _after(write: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    x = x.clone()
    write(x)
    return x


OPS = torch.ops.compiled_sparse_tests
IMPOSTORS: dict[str, Flatten] = {
    "op": lambda x: OPS.mul.default(x),
    "op by its packet": lambda x: OPS.mul(x),
    "writing op": lambda x: _after(OPS.fill.default, x),
    "writing op by its packet": lambda x: _after(OPS.fill, x),
    "function": relu,
    "writing function": lambda x: _after(total, x),
    "in-place operator": lambda x: _after(lambda y: y.__imod__(y.flip(1)), x),
    "item assignment": lambda x: _after(lambda y: y.__setitem__(slice(None), y.flip(1)), x),
}


@pytest.mark.parametrize("impostor", IMPOSTORS.values(), ids=IMPOSTORS)
def test_a_function_named_like_another_is_not_trusted(impostor: Flatten) -> None:
    model = Tiny(lambda m, x: m.attn(impostor(raster(x)))).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")
