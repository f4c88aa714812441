"""Patch embeddings other than a convolution over the video: what proves a grid, what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import Attention
from modules import assert_close
from modules import assert_rewritten
from modules import assert_untouched
from modules import expected_output
from modules import record
from torch import Tensor
from torch import nn

import compiled_sparse as cs

FRAMES, HEIGHT, WIDTH = GRID
IMAGE = (6, 7)
IMAGE_POLICY = cs.STA(window_thw=(1, 1), tile_thw=(2, 3))
Body = Callable[["Patched", Tensor], Tensor]


class Patched(nn.Module):
    """A convolution and a projection to choose from, and attention behind them."""

    def __init__(self, body: Body, inner: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 16, 2, 2)
        self.point = nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.project = nn.Linear(inner, 16)
        self.attn = Attention()
        self.body = body

    def forward(self, video: Tensor) -> Tensor:
        """Hand the input to the body."""
        return self.body(self, video)

    def frames(self, video: Tensor) -> Tensor:
        """Embed each frame of [batch, channels, T, H, W] to [batch, T, channels, h, w]."""
        folded = video.transpose(1, 2).flatten(0, 1)
        return self.conv(folded).unflatten(0, (video.shape[0], -1))


def latent(batch: int = 1, grid: tuple[int, ...] = GRID) -> Tensor:
    """Return a video [batch, 2, T, 2 h, 2 w]."""
    frames, height, width = grid
    return torch.randn(batch, 2, frames, 2 * height, 2 * width)


def image(batch: int = 1) -> Tensor:
    """Return an image [batch, 2, 2 h, 2 w]."""
    return torch.randn(batch, 2, *(2 * side for side in IMAGE))


def rows(x: Tensor) -> Tensor:
    """Return [batch, h * w, channels] of [batch, channels, h, w]."""
    return x.flatten(2).transpose(1, 2)


def _channels_second(m: Patched, x: Tensor) -> Tensor:
    return m.frames(x).permute(0, 1, 3, 4, 2).flatten(1, 3)


def _frames_second(m: Patched, x: Tensor) -> Tensor:
    x = x.transpose(1, 2).contiguous()
    tokens = rows(m.conv(x.reshape(-1, 2, 2 * HEIGHT, 2 * WIDTH)))
    return tokens.reshape(x.shape[0], -1, 16)


def _kept_folded(m: Patched, x: Tensor) -> Tensor:
    tokens = rows(m.conv(x.permute(0, 2, 1, 3, 4).flatten(0, 1)))
    return tokens.contiguous().view(x.shape[0], FRAMES * HEIGHT * WIDTH, 16)


def _conditioned_on_itself(m: Patched, x: Tensor) -> Tensor:
    both = torch.cat([x[:, :1], x[:, 1:] * 2], 1)
    return _channels_second(m, both)


def _longer_history(m: Patched, x: Tensor) -> Tensor:
    """History and new frames joined before they are patched are one video."""
    return _channels_second(m, torch.cat([x[:, :, :1], x[:, :, 1:].tanh()], 2))


FOLDED = (_channels_second, _frames_second, _kept_folded, _conditioned_on_itself, _longer_history)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("embed", FOLDED)
def test_frames_folded_into_the_batch_are_the_first_axis(embed: Body, batch: int) -> None:
    model = Patched(lambda m, x: m.attn(embed(m, x))).requires_grad_(False)
    assert_rewritten(model, latent(batch))


def test_a_batch_as_long_as_the_video_is_not_taken_for_its_frames() -> None:
    model = Patched(lambda m, x: m.attn(_channels_second(m, x)))
    assert_rewritten(model, latent(batch=FRAMES))


def test_a_single_folded_frame_is_an_axis_of_length_one() -> None:
    model = Patched(lambda m, x: m.attn(_channels_second(m, x)))
    assert_rewritten(model, latent(2, (1, 7, 6)), grid_thw=(1, 7, 6))


def test_a_dynamic_grid_is_read_off_input_and_convolution() -> None:
    model = Patched(lambda m, x: m.attn(m.frames(x).permute(0, 1, 3, 4, 2).flatten(1, 3)))
    assert_rewritten(model, latent(2, (3, 7, 6)), grid_thw=(3, 7, 6), dynamic=True)


MISPLACED: dict[str, Body] = {
    "frames after the rest": lambda m, x: m.frames(x).permute(0, 3, 4, 1, 2).flatten(1, 3),
    "height and width swapped": lambda m, x: m.frames(x).permute(0, 1, 4, 3, 2).flatten(1, 3),
    "batch and frames swapped": lambda m, x: (
        rows(m.conv(x.permute(2, 0, 1, 3, 4).flatten(0, 1))).unflatten(0, (2, -1)).flatten(1, 2)
    ),
    "split into other frames": lambda m, x: (
        rows(m.conv(x.transpose(1, 2).flatten(0, 1))).unflatten(0, (3, 2)).flatten(1, 2)[:2]
    ),
    "channels as frames": lambda m, x: (
        rows(
            m.conv(x[:, :1].repeat(1, 2, 1, 1, 1).flatten(1, 2).unflatten(1, (-1, 2)).flatten(0, 1))
        )
        .unflatten(0, (2, -1))
        .flatten(1, 2)
    ),
    "frames shuffled after patching": lambda m, x: (
        m.frames(x)[:, torch.tensor([2, 0, 1])].permute(0, 1, 3, 4, 2).flatten(1, 3)
    ),
    "a frame left out after patching": lambda m, x: (
        m.frames(x)[:, 1:].permute(0, 1, 3, 4, 2).flatten(1, 3)
    ),
    "transposed convolution": lambda m, x: (
        m.up(m.frames(x).flatten(0, 1)).unflatten(0, (2, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    ),
    "pooled": lambda m, x: (
        F.avg_pool2d(m.frames(x).flatten(0, 1), 2)
        .unflatten(0, (2, -1))
        .permute(0, 1, 3, 4, 2)
        .flatten(1, 3)
    ),
}


@pytest.mark.parametrize("embed", MISPLACED.values(), ids=MISPLACED)
def test_folded_frames_in_another_place_are_not_the_first_axis(embed: Body) -> None:
    model = Patched(lambda m, x: m.attn(embed(m, x))).requires_grad_(False)
    assert_untouched(model, latent(batch=2), reason="layout_unknown")


def test_attention_within_frames_and_across_them_is_partial() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        frames = m.frames(x).permute(0, 1, 3, 4, 2).flatten(2, 3)
        spatial = m.attn(frames.flatten(0, 1))
        temporal = m.attn(frames.transpose(1, 2).flatten(0, 1))
        back = spatial.unflatten(0, (x.shape[0], -1)).flatten(1, 2)
        return m.attn(back).sum() + temporal.sum()

    model, x = Patched(body), latent(batch=2)
    backend, actual = record(model, x)
    assert backend.outcomes == ["partial_grid", "partial_grid", "sparse"]
    assert [d.detail.split()[2] for d in backend.decisions[:2]] == ["HW", "T"]
    assert actual.isfinite()


def test_frames_that_cannot_be_named_leave_attention_within_them_partial() -> None:
    """Two axes of the input are folded: which of them is time is not known."""

    def body(m: Patched, x: Tensor) -> Tensor:
        per_channel = x[:, :, :, None].expand(-1, -1, -1, 2, -1, -1)
        return m.attn(rows(m.conv(per_channel.flatten(0, 2))))

    assert_untouched(Patched(body), latent(), reason="partial_grid")


# Images.


def _image_output(model: nn.Module, x: Tensor) -> None:
    backend, actual = record(model, x, policy=IMAGE_POLICY)
    assert backend.outcomes == ["sparse"], [str(d) for d in backend.decisions]
    assert backend.decisions[0].grid_thw == IMAGE
    expected = expected_output(model, x, grid_thw=IMAGE, config=IMAGE_POLICY)
    assert_close(actual, expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_convolved_image_is_a_grid_of_two_axes(batch: int) -> None:
    _image_output(Patched(lambda m, x: m.attn(rows(m.conv(x)))), image(batch))


CUT: dict[str, Body] = {
    "reshape": lambda m, x: x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5),
    "unfold": lambda m, x: x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5),
    "features in another order": lambda m, x: (
        x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 5, 3, 1)
    ),
}


@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
def test_an_image_cut_into_patches_and_projected_is_a_grid(cut: Body) -> None:
    _image_output(
        Patched(lambda m, x: m.attn(m.project(cut(m, x).flatten(3).flatten(1, 2)))), image(2)
    )


MISCUT: dict[str, Body] = {
    "columns first": lambda m, x: x.permute(0, 4, 2, 1, 3, 5),
    "phases instead of patches": lambda m, x: x.permute(0, 3, 5, 1, 2, 4)[..., :2, :2, :2],
    "windows as a batch": lambda m, x: x.permute(2, 0, 4, 3, 5, 1)[:, 0],
}


@pytest.mark.parametrize("arrange", MISCUT.values(), ids=MISCUT)
def test_patches_in_another_order_are_left_alone(arrange: Body) -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        cut = arrange(m, x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)))
        tokens = cut.flatten(1, 2).flatten(2)
        return m.attn(F.linear(tokens, tokens.new_ones(16, tokens.shape[-1])))

    backend = record(Patched(body), image(), policy=IMAGE_POLICY)[0]
    assert backend.outcomes == ["layout_unknown"]


@pytest.mark.parametrize("temporal", [1, 2])
def test_a_video_cut_into_patches_and_projected_is_a_grid(temporal: int) -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, temporal)).unflatten(4, (-1, 2)).unflatten(6, (-1, 2))
        return m.attn(m.project(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)))

    x = latent(2, (temporal * FRAMES, HEIGHT, WIDTH))
    assert_rewritten(Patched(body, 8 * temporal), x)


def test_a_video_cut_with_its_frames_first_and_tokens_before_flattening_is_a_grid() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).unflatten(3, (-1, 2)).unflatten(5, (-1, 2))
        return m.attn(m.project(x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4)).flatten(1, 3))

    assert_rewritten(Patched(body), latent())


def test_one_frame_cut_into_patches_is_a_grid_of_three_axes() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        return m.attn(m.project(x.flatten(4).flatten(1, 3)))

    assert_rewritten(Patched(body), latent(1, (1, 7, 6)), grid_thw=(1, 7, 6))


def test_patches_with_a_dynamic_grid_are_read_off_the_input() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        x = x.reshape(batch, 2, frames, height // 2, 2, width // 2, 2)
        return m.attn(m.project(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)))

    assert_rewritten(Patched(body), latent(2, (3, 7, 6)), grid_thw=(3, 7, 6), dynamic=True)


def test_four_dimensional_text_is_no_grid() -> None:
    """Several prompts side by side: nothing was cut into patches."""
    model = Patched(lambda m, x: m.attn(x.flatten(1, 2)))
    backend = record(model, torch.randn(1, 3, 8, 16), policy=IMAGE_POLICY)[0]
    assert backend.outcomes == ["layout_unknown"]


def test_tokens_per_channel_are_no_grid() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).permute(0, 1, 2, 3, 5, 4, 6)
        tokens = x.flatten(5).flatten(1, 4)
        return m.attn(F.linear(tokens, tokens.new_ones(16, 4)))

    assert_untouched(Patched(body), latent(), reason="layout_unknown")


# Convolutions over a grid that is known already.


def test_convolutions_of_the_same_length_keep_the_tokens() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = m.frames(x)
        tokens = m.attn(x.permute(0, 1, 3, 4, 2).flatten(1, 3))
        back = tokens.unflatten(1, GRID).permute(0, 1, 4, 2, 3).flatten(0, 1)
        mixed = m.point(m.depthwise(back)).unflatten(0, (-1, FRAMES))
        return m.attn(tokens + mixed.permute(0, 1, 3, 4, 2).flatten(1, 3))

    assert_rewritten(Patched(body), latent(2), calls=2)


def test_a_strided_convolution_starts_a_smaller_grid() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = m.down(m.frames(x).flatten(0, 1)).unflatten(0, (-1, FRAMES))
        return m.attn(x.permute(0, 1, 3, 4, 2).flatten(1, 3))

    model = Patched(body)
    assert_rewritten(model, latent(2, (3, 7, 6)), grid_thw=(3, 4, 3))


def test_merging_tokens_starts_a_smaller_grid() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = m.frames(x).permute(0, 1, 3, 4, 2).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        merged = x.transpose(3, 4).flatten(4).flatten(1, 3)
        return m.attn(m.project(merged))

    model = Patched(body, 64)
    assert_rewritten(model, latent(1, (3, 8, 6)), grid_thw=(3, 4, 3))


def test_a_grid_of_flattened_rows_is_not_started_by_a_convolution() -> None:
    """A convolution over time and flattened space keeps what it leaves alone, mixes the rest."""

    def body(m: Patched, x: Tensor, kernel: tuple[int, int]) -> Tensor:
        x = m.frames(x).permute(0, 2, 1, 3, 4).flatten(3)
        padding = (kernel[0] // 2, kernel[1] // 2)
        x = F.conv2d(x, x.new_ones(16, 1, *kernel), padding=padding, groups=16)
        return m.attn(x.flatten(2).transpose(1, 2))

    assert_rewritten(Patched(lambda m, x: body(m, x, (3, 1))), latent())
    assert_untouched(Patched(lambda m, x: body(m, x, (1, 3))), latent(), reason="layout_unknown")


def test_tokens_of_two_resolutions_are_several_grids() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        fine = m.frames(x)
        coarse = m.down(fine.flatten(0, 1)).unflatten(0, (-1, FRAMES))
        tokens = [y.permute(0, 1, 3, 4, 2).flatten(1, 3) for y in (fine, coarse)]
        return m.attn(torch.cat(tokens, 1))

    assert_untouched(Patched(body), latent(), reason="several_grids")


def test_history_patched_by_itself_is_several_grids() -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        past, new = (_channels_second(m, frames) for frames in (x[:, :, :1], x[:, :, 1:]))
        return m.attn(torch.cat([past, new], 1))

    assert_untouched(Patched(body), latent(1, (5, 4, 5)), reason="several_grids")


# Windows.


def _windows(x: Tensor) -> Tensor:
    """Cut [batch, T, h, w, channels] into windows of 2 by 2: [windows, 4 T, channels]."""
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5, 6)
    return x.flatten(3, 5).flatten(0, 2)


def _undone(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    x = x.unflatten(1, (-1, 2, 2)).unflatten(0, (batch, height // 2, width // 2))
    return x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_are_left_alone_and_the_grid_is_known_when_they_are_undone(shift: int) -> None:
    def body(m: Patched, x: Tensor) -> Tensor:
        x = m.frames(x).permute(0, 1, 3, 4, 2)
        batch, _, height, width, _ = x.shape
        moved = x.roll((-shift, -shift), (2, 3)) if shift else x
        moved = _undone(m.attn(_windows(moved)), batch, height, width)
        x = moved.roll((shift, shift), (2, 3)) if shift else moved
        return m.attn(x.flatten(1, 3))

    backend, _ = record(Patched(body), latent(2, (3, 4, 6)))
    assert backend.outcomes == ["layout_unknown", "layout_unknown" if shift else "sparse"]
    assert [d.grid_thw for d in backend.decisions if d.is_sparse] == [(3, 4, 6)] * (1 - shift)
