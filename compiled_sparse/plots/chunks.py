"""The pattern of a mechanism in which each query selects chunks for itself."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compiled_sparse.block_lists import ChunkSelection
from compiled_sparse.block_lists import block_lists
from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.plots.pattern import HIDDEN
from compiled_sparse.plots.pattern import SEEN
from compiled_sparse.plots.pattern import SHOWN
from compiled_sparse.plots.pattern import Pattern
from compiled_sparse.plots.pattern import View
from compiled_sparse.plots.pattern import check_head
from compiled_sparse.plots.pattern import checked_size
from compiled_sparse.plots.pattern import made_up
from compiled_sparse.plots.pattern import mark_text
from compiled_sparse.plots.pattern import number_of
from compiled_sparse.plots.pattern import on_grid
from compiled_sparse.plots.pattern import title
from compiled_sparse.plots.words import words_for


def chunk_pattern(config: VMoBA, view: View) -> Pattern:
    """Return the pattern of the first sparse layer of a config, seen from one query token.

    A chunk of queries sees what any of its tokens selects.

    Raises:
        ConfigError: if there is no such head.
        LayoutError: if grid and query do not fit, or there are too many chunks.
    """
    layer = config.for_layer(config.first_full_layer)
    assert isinstance(layer, VMoBA)
    config = dataclasses.replace(layer, first_full_step=0)
    q, k = view.qk or made_up(config, view)
    check_head(view.head, q.shape[1])
    tokens = BlockLayout(view.grid, (1,) * len(view.grid), view.text.before)
    query = number_of(tokens, view.query_tile)
    selection = block_lists(config, q, k, grid_thw=view.grid, text=view.text)
    assert isinstance(selection, ChunkSelection)
    chunks = checked_size(selection.chunks)
    seen = selection.mask(view.head)
    slots = block_tokens(chunks)
    mask = torch.stack([seen[each[each >= 0].long()].any(0) for each in slots]).to(torch.uint8)
    row = int((slots == query).any(1).nonzero()[0, 0])
    mask[row] = torch.where(seen[query], SHOWN, HIDDEN)
    mark_text(mask, chunks, chunks)
    words = words_for(config, chunks.tile, view.head)
    density = selection.of_head(view.head).density
    return Pattern(
        mask,
        row,
        _tokens(slots[seen[query]], query, chunks, view),
        chunks.tile if len(chunks.tile) == len(view.grid) else (),
        words,
        density,
        title(config, words, view, density),
    )


def _tokens(slots: Tensor, query: int, chunks: BlockLayout, view: View) -> Tensor:
    tokens = torch.full((chunks.num_tokens,), HIDDEN, dtype=torch.uint8)
    tokens[slots[slots >= 0].long()] = SEEN
    tokens[query] = SHOWN
    return on_grid(tokens, view)
