"""Lists given to flex_attention mean what they mean to the kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse.block_lists import BlockLists
from compiled_sparse.block_lists import block_lists
from compiled_sparse.config import MechanismConfig
from compiled_sparse.flex import flex_block_mask
from compiled_sparse.flex import has_full_blocks

GRID, HEADS = (4, 8, 16), 2
LENGTH = 512


def lists_of(config: MechanismConfig, text: cs.Text | None = None) -> BlockLists:
    length = LENGTH + (text.after if text else 0)
    q, k = torch.randn(2, 1, HEADS, length, 16)
    lists = block_lists(config, q, k, grid_thw=GRID, text=text)
    assert isinstance(lists, BlockLists)
    return lists


RUNS = [cs.SWBA(block=64, window=2), cs.SLA(topk_ratio=0.4, block_q=128, block_k=64)]


@pytest.mark.parametrize("config", [*RUNS, cs.VSA(sparsity=0.7, tile_thw=(2, 4, 4))])
def test_every_listed_block_is_a_full_one_and_no_other_is_seen(config: MechanismConfig) -> None:
    lists = lists_of(config)
    dense = flex_block_mask(lists, HEADS).to_dense()[0].bool()
    assert torch.equal(dense, torch.stack([lists.mask(head) for head in range(HEADS)]))


@pytest.mark.slow
@pytest.mark.parametrize("config", RUNS)
def test_flex_attention_gives_the_same_over_runs_of_tokens(
    config: MechanismConfig, fresh_compiler: None
) -> None:
    q, k, v = torch.randn(3, 1, HEADS, LENGTH, 16)
    lists = block_lists(config, q, k, grid_thw=GRID)
    assert isinstance(lists, BlockLists)
    # Only compiled it leaves blocks out.
    compiled = torch.compile(flex_attention)
    actual = compiled(q, k, v, block_mask=flex_block_mask(lists, HEADS))
    expected = cs.attention(q, k, v, config, grid_thw=GRID)
    torch.testing.assert_close(actual, expected)


def test_blocks_that_are_not_full_are_refused() -> None:
    assert has_full_blocks(lists_of(cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 4, 4))))
    ragged = lists_of(cs.STA(window_thw=(1, 3, 3), tile_thw=(3, 4, 4)))
    text = lists_of(cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 4, 4)), cs.Text(after=3))
    for lists in (ragged, text):
        assert not has_full_blocks(lists)
        with pytest.raises(errors.LayoutError, match="full blocks only"):
            flex_block_mask(lists, HEADS)
