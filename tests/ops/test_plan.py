"""Index tensors: tokens of blocks and the lists of sliding tile attention."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from hypothesis import given
from strategies import layouts
from strategies import layouts_with_windows

from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import PADDING
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.pattern import sta_density

CPU = torch.device("cpu")


@given(layouts())
def test_block_tokens_equal_naive_loops_with_padding_behind(layout: BlockLayout) -> None:
    naive = oracle.blocks(layout.grid, layout.tile, layout.text_before, layout.text_after)
    padded = [block + [PADDING] * (layout.block_size - len(block)) for block in naive]
    assert block_tokens(layout).tolist() == padded


@given(layouts())
def test_every_token_lies_in_exactly_one_slot(layout: BlockLayout) -> None:
    tokens = block_tokens(layout)
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(layout.num_tokens))
    assert bool((tokens[tokens < 0] == PADDING).all())
    assert tokens.dtype == torch.int32
    assert tokens.shape == (layout.num_blocks, layout.block_size)
    assert (tokens >= 0).sum(1).tolist() == list(layout.block_sizes)


@given(layouts_with_windows())
def test_lists_see_what_naive_masks_see(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    indices, counts = sta_lists(layout, windows, CPU)
    blocks = oracle.blocks(layout.grid, layout.tile, layout.text_before, layout.text_after)
    mask = oracle.list_mask(indices, counts, blocks, blocks)[0]
    text = (layout.text_before, layout.text_after)
    assert torch.equal(mask, oracle.sta_mask(layout.grid, layout.tile, windows, *text))


@given(layouts_with_windows())
def test_lists_are_ascending_int32_and_padded_with_a_valid_block(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    indices, counts = sta_lists(layout, windows, CPU)
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape[:3] == counts.shape == (1, len(windows), layout.num_blocks)
    assert int(counts.max()) == indices.shape[3]
    for head, row in itertools.product(range(len(windows)), range(layout.num_blocks)):
        listed = indices[0, head, row].tolist()
        count = int(counts[0, head, row])
        assert listed[:count] == sorted(set(listed[:count]))
        assert listed[count:] == [0] * (len(listed) - count)


@given(layouts_with_windows())
def test_density_equals_the_counted_density_of_the_lists(
    case: tuple[BlockLayout, tuple[tuple[int, ...], ...]],
) -> None:
    layout, windows = case
    indices, counts = sta_lists(layout, windows, CPU)
    sizes = torch.tensor(layout.block_sizes)
    listed = torch.arange(indices.shape[3]) < counts[..., None]
    keys_per_query = (sizes[indices.long()] * listed).sum(-1)
    counted = (keys_per_query * sizes).sum().item() / (len(windows) * layout.num_tokens**2)
    assert sta_density(layout, windows) == pytest.approx(counted, rel=1e-12)


def test_the_window_rule_equals_naive_loops_on_every_axis() -> None:
    for num_tiles, nominal in itertools.product(range(1, 13), range(1, 16)):
        indices, counts = sta_lists(BlockLayout((num_tiles,), (1,)), ((nominal,),), CPU)
        for tile in range(num_tiles):
            listed = indices[0, 0, tile, : int(counts[0, 0, tile])].tolist()
            assert listed == oracle.window(num_tiles, nominal, tile), (num_tiles, nominal, tile)


def test_an_even_window_lists_what_the_next_odd_one_lists() -> None:
    layout = BlockLayout((14, 21), (2, 3))
    even = sta_lists(layout, ((2, 4),), CPU)
    odd = sta_lists(layout, ((3, 5),), CPU)
    assert all(torch.equal(a, b) for a, b in zip(even, odd, strict=True))


def test_an_even_window_that_spans_the_axis_lists_all_of_it() -> None:
    layout = BlockLayout((20,), (2,))
    _, counts = sta_lists(layout, ((10,),), CPU)
    assert counts.unique().tolist() == [10]


def test_without_text_and_with_one_width_no_slot_is_wasted() -> None:
    indices, counts = sta_lists(BlockLayout((10, 12, 8), (2, 3, 2)), ((3, 3, 3),), CPU)
    assert indices.shape[3] == 27
    assert bool((counts == 27).all())


def test_plans_are_built_once_per_layout() -> None:
    layout = BlockLayout((9, 11), (4, 3), 2, 5)
    assert block_tokens(layout) is block_tokens(BlockLayout((9, 11), (4, 3), 2, 5))
    first = sta_lists(layout, ((3, 3),), CPU)
    assert sta_lists(BlockLayout((9, 11), (4, 3), 2, 5), ((3, 3),), CPU) is first
