"""Sequences cut into runs: joined again they are the video, in another order they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import GRID
from modules import LENGTH
from modules import POLICY
from modules import Attention
from modules import RecordingBackend
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

import compiled_sparse as cs

FRAME = GRID[1] * GRID[2]
Move = Callable[[Tensor], Tensor]


def _first_frame_changed(x: Tensor) -> Tensor:
    return torch.cat([x[:, :FRAME] * 2, x[:, FRAME:] + 1], 1)


def _written_back(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 7:40] = x[:, 7:40].tanh()
    return x


REJOINED: dict[str, Move] = {
    "first frame changed": _first_frame_changed,
    "in three": lambda x: torch.cat([x[:, :11], x[:, 11:30], x[:, 30:]], 1),
    "chunks": lambda x: torch.cat(x.chunk(7, 1), 1),
    "a slice of a slice": lambda x: torch.cat([x[:, :40][:, :5], x[:, :40][:, 5:], x[:, 40:]], 1),
    "written back": _written_back,
}


@pytest.mark.parametrize("move", REJOINED.values(), ids=REJOINED)
def test_runs_joined_in_order_are_the_video_again(move: Move) -> None:
    assert_rewritten(Tiny(lambda m, x: m.attn(move(raster(x)))).requires_grad_(False), video())


def _written_elsewhere(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 7:40] = x[:, 8:41] * 1
    return x


def _read_through_an_old_view(x: Tensor) -> Tensor:
    x = x.clone()
    view = x[:, :30]
    x[:] = x.flip(1)
    return torch.cat([view, x[:, 30:]], 1)


SCATTERED: dict[str, Move] = {
    "repeated": lambda x: torch.cat([x[:, :40], x[:, 20:40]], 1),
    "a gap": lambda x: torch.cat([x[:, :20], x[:, 21:]], 1),
    "swapped": lambda x: torch.cat([x[:, 20:], x[:, :20]], 1),
    "the end left out": lambda x: x[:, :FRAME],
    "one run of two orders": lambda x: torch.cat([x[:, :20], x.flip(1)[:, 20:]], 1),
    "written elsewhere": _written_elsewhere,
    "read through an old view": _read_through_an_old_view,
}


@pytest.mark.parametrize("move", SCATTERED.values(), ids=SCATTERED)
def test_runs_in_another_order_or_incomplete_are_left_alone(move: Move) -> None:
    model = Tiny(lambda m, x: m.attn(move(raster(x)))).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


def test_a_run_is_not_text_beside_its_video() -> None:
    model = Tiny(lambda m, x: m.attn(torch.cat([raster(x), raster(x)[:, :FRAME]], 1)))
    assert_untouched(model, video(), reason="layout_unknown")


def test_frames_cut_off_before_attention_are_left_alone_and_joined_again_known() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        part = m.attn(raster(x[:, :, 1:]))
        x = torch.cat([x[:, :, :1], x[:, :, 1:] * 2], 2)
        return m.attn(raster(x)) + part.mean()

    backend, _ = record(Tiny(body), video())
    assert backend.outcomes == ["layout_unknown", "sparse"]


def test_a_signal_that_controls_some_frames_keeps_the_layout() -> None:
    def body(m: Tiny, x: Tensor, signal: Tensor) -> Tensor:
        x[:, :, 1:] = x[:, :, 1:] + m.patch(signal)
        return m.attn(raster(x))

    model = Tiny(body).requires_grad_(False)
    assert_rewritten(model, video(), video(grid=(2, 4, 5)))


def test_a_signal_with_axes_of_its_own_ends_the_layout() -> None:
    def body(m: Tiny, x: Tensor, signal: Tensor) -> Tensor:
        return m.attn(raster(x + m.patch(signal).permute(0, 1, 4, 3, 2)))

    model = Tiny(body).requires_grad_(False)
    assert_untouched(model, video(grid=(3, 4, 3)), video(grid=(3, 4, 3)), reason="layout_unknown")


# Text that `cs.metadata` does not mention.


def _joined(*lengths: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    attn = Attention().requires_grad_(False)

    def model(*parts: Tensor) -> Tensor:
        return attn(torch.cat(parts, 1))

    return model, tuple(tokens(1, length) for length in lengths)


def _outcome(*lengths: int) -> RecordingBackend:
    model, inputs = _joined(*lengths)
    return record(model, *inputs, grid_thw=GRID)[0]


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ((LENGTH,), (0, 0)),
        ((7, LENGTH), (7, 0)),
        ((LENGTH, 3, 4), (0, 7)),
        ((7, LENGTH, 70), (7, 70)),
        ((7, 20, 40, 5), (7, 5)),
    ],
)
def test_text_is_what_lies_around_the_part_of_the_videos_length(
    lengths: tuple[int, ...], text: tuple[int, int]
) -> None:
    model, inputs = _joined(*lengths)
    backend, actual = record(model, *inputs, grid_thw=GRID)
    (decision,) = backend.decisions
    assert (decision.decision, decision.layout_origin) == ("sparse", "metadata")
    assert (decision.text_before, decision.text_after) == text
    where = cs.Text(before=text[0], after=text[1])
    assert_close(actual, expected_output(model, *inputs, text=where))


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (20, 40, 20), (67,), (7, 59)])
def test_text_that_cannot_be_told_from_the_video_is_asked_for(lengths: tuple[int, ...]) -> None:
    (decision,) = _outcome(*lengths).decisions
    assert decision.reason == "layout_unknown"
    says = "pass text=" if sum(lengths) > LENGTH else "this call has"
    assert says in decision.detail


def test_sequences_of_other_tokens_with_the_videos_length_are_all_refused() -> None:
    first, second, joint = (Attention().requires_grad_(False) for _ in range(3))

    def model(video: Tensor, text: Tensor, position: Tensor) -> Tensor:
        video, text = first(video + position), second(text + position)
        return joint(torch.cat([video, text], 1))

    inputs = [tokens(1, LENGTH) for _ in range(3)]
    backend, actual = record(model, *inputs, grid_thw=GRID)
    assert backend.outcomes == ["layout_unknown"] * 3
    assert "pass text=" in backend.decisions[0].detail
    assert_close(actual, model(*inputs))

    short = [tokens(1, LENGTH), tokens(1, 7), tokens(1, 1)]
    assert record(model, *short, grid_thw=GRID)[0].outcomes == [
        "sparse",
        "layout_unknown",
        "sparse",
    ]


def test_the_same_tokens_with_something_added_are_no_other_sequence() -> None:
    first, second = (Attention().requires_grad_(False) for _ in range(2))

    def model(video: Tensor, position: Tensor) -> Tensor:
        return second(first(video) + position)

    inputs = [tokens(1, LENGTH) for _ in range(2)]
    assert record(model, *inputs, grid_thw=GRID)[0].outcomes == ["sparse"] * 2


# A block alone, whose rotary table is an input over text and video.


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * table.cos() + torch.cat((-second, first), -1) * table.sin()


def _joint(edit: Callable[[Tensor, Tensor], Tensor]) -> tuple[Any, list[Tensor]]:
    attn = Attention().requires_grad_(False)

    def model(text: Tensor, video: Tensor, table: Tensor) -> Tensor:
        return attn(torch.cat([text, video], 1), edit=lambda x: edit(x, table))

    return model, [tokens(1, 7), tokens(1, LENGTH)]


def _rotated_after(x: Tensor, table: Tensor) -> Tensor:
    x[:, 7:] = _rotated(x[:, 7:], table)
    return x


def _rotated_elsewhere(x: Tensor, table: Tensor) -> Tensor:
    x[:, 7:] = _rotated(x[:, 6:-1], table)
    return x


def _swapped(x: Tensor, table: Tensor) -> Tensor:
    return torch.cat([x[:, 7:], x[:, :7]], 1) * table


@pytest.mark.parametrize(("edit", "rows"), [(_rotated, 67), (_rotated_after, LENGTH)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_table_for_text_and_video_that_comes_from_outside_keeps_the_layout(
    edit: Any, rows: int, dynamic: bool
) -> None:
    model, inputs = _joint(edit)
    inputs.append(torch.randn(1, rows, 1, 8))
    backend, actual = record(model, *inputs, grid_thw=GRID, dynamic=dynamic)
    assert backend.outcomes == ["sparse"]
    assert_close(actual, expected_output(model, *inputs, text=cs.Text(before=7)))


@pytest.mark.parametrize(("edit", "rows"), [(_rotated_elsewhere, LENGTH), (_swapped, 67)])
def test_a_table_does_not_hide_that_tokens_moved(edit: Any, rows: int) -> None:
    model, inputs = _joint(edit)
    backend, _ = record(model, *inputs, torch.randn(1, rows, 1, 8), grid_thw=GRID)
    assert backend.outcomes == ["layout_unknown"]


def test_text_of_the_videos_length_is_told_from_it_by_the_graph() -> None:
    model = Tiny(lambda m, x, t: m.attn(torch.cat([t, raster(x)], 1)))
    inputs = (video(), tokens())
    backend, actual = record(model, *inputs, grid_thw=GRID)
    (decision,) = backend.decisions
    assert (decision.text_before, decision.text_after) == (LENGTH, 0)
    expected = expected_output(model, *inputs, text=cs.Text(before=LENGTH))
    assert_close(actual, expected)
    assert record(model, *inputs, policy=POLICY)[0].outcomes == ["sparse"]


def test_text_longer_than_the_video_is_text() -> None:
    model = Tiny(lambda m, x, t: m.attn(torch.cat([raster(x), t], 1)))
    assert_rewritten(model, video(), tokens(1, 2 * LENGTH), text=cs.Text(after=2 * LENGTH))
