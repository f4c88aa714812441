"""Who needs whose keys, and the block lists of each part: integers, in one process."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.ring import ring_pattern
from compiled_sparse.distributed.ring_lists import part_of
from compiled_sparse.distributed.ring_lists import ring_lists
from compiled_sparse.distributed.ring_schedule import Message
from compiled_sparse.distributed.ring_schedule import RingPattern
from compiled_sparse.distributed.ring_schedule import backward_messages
from compiled_sparse.distributed.ring_schedule import ring_schedule
from compiled_sparse.ops.sta import flatten_windows
from compiled_sparse.reference.attention import token_mask

CPU = torch.device("cpu")


def sta_pattern(window: int, ranks: int, layers: int = 1) -> RingPattern:
    config = cs.STA(window_thw=(window, 3, 3), tile_thw=(2, 4, 4))
    return ring_pattern(config, (2 * layers * ranks, 8, 8), ranks)


def offsets(pattern: RingPattern) -> list[int]:
    return [step.offset for step in ring_schedule(pattern)]


@pytest.mark.parametrize(
    ("window", "ranks", "layers", "expected"),
    [
        (1, 8, 1, []),
        (3, 8, 1, [1, 2, 6, 7]),  # at the borders the window is shifted inwards
        (3, 8, 2, [1, 7]),
        (5, 8, 2, [1, 2, 6, 7]),
        (99, 8, 2, [1, 2, 3, 4, 5, 6, 7]),
        (3, 1, 4, []),
    ],
)
def test_only_steps_that_some_rank_needs_are_taken(
    window: int, ranks: int, layers: int, expected: list[int]
) -> None:
    assert offsets(sta_pattern(window, ranks, layers)) == expected


def test_a_window_costs_a_halo() -> None:
    forth, back = ring_schedule(sta_pattern(3, 4, layers=5))
    assert [part and (part.source, part.key_first, part.count) for part in forth.parts] == [
        None,
        (0, 4, 1),
        (1, 4, 1),
        (2, 4, 1),
    ]
    assert [part and (part.source, part.query_first, part.count) for part in back.parts] == [
        (1, 4, 1),
        (2, 4, 1),
        (3, 4, 1),
        None,
    ]
    assert forth.sent_by(0) == (1, forth.parts[1])
    assert forth.sent_by(3) is None


def test_blocks_hear_from_those_before_them_only() -> None:
    pattern = ring_pattern(cs.SWBA(block=4, window=3), (16, 2, 2), 4)
    (step,) = ring_schedule(pattern)
    assert step.offset == 1
    assert step.parts[0] is None
    assert [part.count for part in step.parts if part is not None] == [2, 2, 2]


def test_dense_attention_goes_all_the_way_round() -> None:
    pattern = ring_pattern(cs.Dense(), (4, 5, 3), 4)
    assert offsets(pattern) == [1, 2, 3]
    assert all(part is not None for step in ring_schedule(pattern) for part in step.parts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_gradients_go_home_two_steps_later_and_all_do(ranks: int) -> None:
    steps = ring_schedule(sta_pattern(99, ranks))
    messages = backward_messages(steps)
    assert [each.keys for each in messages if each.keys] == list(steps)
    assert [each.home for each in messages if each.home] == list(steps)
    assert len(messages) == len(steps) + min(len(steps), 2)
    assert Message() not in messages
    for place, message in enumerate(messages):
        if message.home is not None:
            # Only the very last step's gradients are asked for right after its keys.
            assert place - steps.index(message.home) == min(2, len(steps))


def seen(
    config: MechanismConfig, grid: tuple[int, ...], text: cs.Text, ranks: int
) -> tuple[Tensor, Tensor]:
    """How often each query sees each key over all parts; text queries are summed over the ranks."""
    pattern = ring_pattern(config, grid, ranks)
    n, before, after = pattern.shard_tokens, text.before, text.after
    length = ranks * n + before + after
    counts = torch.zeros(max(1, len(pattern.windows)), length, length, dtype=torch.int64)
    for rank in range(ranks):
        whole = torch.arange(length)
        video = whole[before : before + ranks * n].view(ranks, n)
        own = torch.cat([whole[:before], video[rank], whole[before + ranks * n :]])
        blocks = oracle.blocks(pattern.shard_grid, pattern.tile, before, after)
        mask = oracle.list_mask(
            *ring_lists(pattern, rank, rank, before, after, CPU), blocks, blocks
        )
        counts[:, own[:, None], own] += mask[0].long()
        for step in ring_schedule(pattern):
            part = step.parts[rank]
            if part is None:
                continue
            layer = pattern.layer_tokens
            queries = video[rank][part.query_first * layer :][: part.count * layer]
            keys = video[part.source][part.key_first * layer :][: part.count * layer]
            part_grid = (part.count * pattern.layer_extent, *pattern.grid[1:])
            blocks = oracle.blocks(part_grid, pattern.tile)
            lists = ring_lists(pattern, rank, part.source, 0, 0, CPU)
            mask = oracle.list_mask(*lists, blocks, blocks)
            counts[:, queries[:, None], keys] += mask[0].long()
    expected = token_mask(config, slice(0, length), length, length, grid, text)[0]
    return counts, expected.expand_as(counts).long()


@settings(max_examples=25)
@given(
    ranks=st.integers(1, 4),
    layers=st.integers(1, 3),
    windows=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    thick=st.integers(1, 2),
    text=st.builds(cs.Text, before=st.sampled_from([0, 3]), after=st.sampled_from([0, 5])),
)
def test_the_parts_of_a_window_are_all_of_it_and_nothing_twice(
    ranks: int, layers: int, windows: list[int], thick: int, text: cs.Text
) -> None:
    config = cs.STA(window_thw=tuple((w, 1, 3) for w in windows), tile_thw=(thick, 1, 2))
    counts, expected = seen(config, (ranks * layers * thick, 2, 3), text, ranks)
    assert torch.equal(counts, expected)


@settings(max_examples=15)
@given(ranks=st.integers(1, 4), layers=st.integers(1, 3), window=st.integers(1, 9))
def test_the_parts_of_a_causal_window_are_all_of_it_and_nothing_twice(
    ranks: int, layers: int, window: int
) -> None:
    config = cs.SWBA(block=3, window=window)
    counts, expected = seen(config, (ranks * layers * 3,), cs.Text(), ranks)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("text", [cs.Text(), cs.Text(before=4, after=1)])
def test_the_parts_of_dense_attention_are_all_of_it_and_nothing_twice(text: cs.Text) -> None:
    counts, expected = seen(cs.Dense(), (6, 5, 3), text, 3)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("text", [(0, 0), (3, 200)])
@pytest.mark.parametrize(
    "pattern",
    [
        sta_pattern(3, 4, layers=3),
        ring_pattern(cs.STA(window_thw=((3, 1), (5, 99)), tile_thw=(2, 4)), (16, 7), 4),
        ring_pattern(cs.SWBA(block=4, window=3), (8, 2, 2), 4),
        ring_pattern(cs.Dense(), (8, 13, 11), 4),
    ],
    ids=lambda pattern: f"{pattern.kind}{len(pattern.grid)}",
)
def test_fake_lists_are_shaped_like_real_ones(pattern: RingPattern, text: tuple[int, int]) -> None:
    for source in range(pattern.size):
        if part_of(pattern, 1, source) is None:
            continue
        windows = flatten_windows(pattern.windows)
        geometry = (pattern.kind, list(pattern.grid), list(pattern.tile), windows, pattern.size)
        arguments = (*geometry, 1, source, *text, CPU)
        real = torch.ops.compiled_sparse.ring_block_lists(*arguments)
        with FakeTensorMode():
            fake = torch.ops.compiled_sparse.ring_block_lists(*arguments)
        for one, other in zip(real, fake, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_shards_hold_whole_layers() -> None:
    pattern = sta_pattern(3, 4, layers=3)
    assert pattern.shard_grid == (6, 8, 8)
    assert (pattern.layers_per_shard, pattern.num_layers) == (3, 12)
    assert pattern.layer_tokens * pattern.layers_per_shard == pattern.shard_tokens
    assert pattern.layer_tiles == math.prod((1, 2, 2))
