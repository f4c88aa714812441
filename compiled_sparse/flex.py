"""Block lists in the form that `flex_attention` takes, to time it beside the same work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from compiled_sparse.block_lists import BlockLists
from compiled_sparse.errors import LayoutError
from compiled_sparse.layout import BlockLayout


def has_full_blocks(lists: BlockLists) -> bool:
    """Whether every block is full, so that it is a run of tokens once these are moved."""

    def full(layout: BlockLayout) -> bool:
        return set(layout.block_sizes) == {layout.block_size}

    return full(lists.queries) and full(lists.keys)


def flex_block_mask(lists: BlockLists, heads: int) -> BlockMask:
    """Return lists as full blocks of tokens that were moved into the order of the blocks.

    Args:
        lists: Key blocks of each query block.
        heads: Number of query heads.

    Raises:
        LayoutError: if a block is not full.
    """
    if not has_full_blocks(lists):
        keys = lists.keys
        raise LayoutError(
            "flex_attention takes full blocks only, and some hold fewer tokens",
            got=f"grid {keys.grid} in blocks of {lists.queries.tile} queries and {keys.tile} keys, "
            f"text {keys.text_before} + {keys.text_after}",
            expected="blocks that divide the grid, and text of whole blocks",
            next_step="change the grid, the blocks or the text, or leave flex_attention out",
        )
    room = lists.keys.num_blocks - lists.indices.shape[-1]
    shape = (1, heads, lists.queries.num_blocks)
    indices = F.pad(lists.indices, (0, room)).expand(*shape, -1).contiguous()
    counts = lists.counts.expand(shape).contiguous()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=(lists.queries.block_size, lists.keys.block_size),
    )
