"""What is drawn, as numbers: blocks that see blocks, and the tokens that one query block sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compiled_sparse.block_lists import BlockLists
from compiled_sparse.block_lists import block_lists
from compiled_sparse.config import STA
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.layout import sequence_grid
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.plots.words import Words
from compiled_sparse.plots.words import tokens_on
from compiled_sparse.plots.words import words_for
from compiled_sparse.registry import mechanism_of
from compiled_sparse.synthetic import made_up_tokens

MAX_BLOCKS = 4096
HEAD_DIM = 64

HIDDEN, SEEN, SHOWN, TEXT = range(4)


@dataclass(frozen=True)
class Pattern:
    """One head's pattern on one layout, seen from one place. A mechanism only has to make this.

    Args:
        mask: uint8 [query blocks, key blocks]: `HIDDEN`, `SEEN`, `SHOWN` where the query that is
            shown sees a block, `TEXT` in rows and columns of text.
        row: The row of `mask` that is shown.
        tokens: uint8, shaped like the grid: `HIDDEN`, `SEEN`, and `SHOWN` for the query itself.
        tile: Sides of the tiles whose borders are drawn; empty for none.
        words: What to call things.
        density: Fraction of (query, key) pairs that the head attends to.
        title: The title.
    """

    mask: Tensor
    row: int
    tokens: Tensor
    tile: tuple[int, ...]
    words: Words
    density: float
    title: str

    @property
    def has_text(self) -> bool:
        """Whether there are blocks of text."""
        return bool((self.mask == TEXT).any())


@dataclass(frozen=True)
class View:
    """What of a mechanism is shown; see `plot_pattern`."""

    grid: tuple[int, ...]
    text: Text = Text()
    query_tile: tuple[int, ...] | None = None
    head: int = 0
    qk: tuple[Tensor, Tensor] | None = None
    seed: int = 0


def pattern_of(config: MechanismConfig, view: View) -> Pattern:
    """Return the pattern of a mechanism.

    Raises:
        ConfigError: if the config has no pattern, or none for this head.
        LayoutError: if grid, tile and query tile do not fit, or there are too many blocks.
    """
    config = config.at()
    layout = checked_size(_query_layout(config, view))
    query = number_of(layout, view.query_tile)
    lists = _lists(config, view, layout)
    checked_size(lists.keys)
    words = words_for(config, layout.tile, view.head)
    mask = _mask(lists, view.head)
    row = mask[query]
    row[row == SEEN] = SHOWN
    density = lists.of_head(view.head).density
    return Pattern(
        mask,
        query,
        _tokens(lists, query, view),
        lists.keys.tile if len(lists.keys.grid) == len(view.grid) else (),
        words,
        density,
        title(config, words, view, density),
    )


def _query_layout(config: MechanismConfig, view: View) -> BlockLayout:
    before, after = view.text.before, view.text.after
    if config.grid_is_sequence:
        length = sequence_grid(view.grid, before, after)
        return BlockLayout(length, config.resolve_tile(length))
    return BlockLayout(view.grid, config.resolve_tile(view.grid), before, after)


def checked_size(layout: BlockLayout) -> BlockLayout:
    """Return a layout that has few enough blocks to draw.

    Raises:
        LayoutError: if it has not.
    """
    if layout.num_blocks > MAX_BLOCKS:
        raise LayoutError(
            "too many blocks to draw",
            got=f"{layout.num_blocks} blocks of tile {layout.tile} on grid {layout.grid}",
            expected=f"at most {MAX_BLOCKS}",
            next_step="draw a smaller grid or larger tiles",
        )
    return layout


def number_of(layout: BlockLayout, tile: tuple[int, ...] | None) -> int:
    """Return the number of a query tile among all blocks; by default of the middle one."""
    counts = layout.tiles_per_axis
    if tile is None:
        tile = tuple(count // 2 for count in counts)
    fits = len(tile) == len(counts) and all(0 <= i < n for i, n in zip(tile, counts, strict=False))
    if not fits:
        raise LayoutError(
            "query_tile is not on the grid of tiles",
            got=repr(tuple(tile)),
            expected=f"one index per axis, each below {counts}",
            next_step="pass query_tile in tiles, not in tokens",
        )
    index = 0
    for position, count in zip(tile, counts, strict=True):
        index = index * count + position
    return index + layout.num_text_blocks_before


def _is_fixed(config: MechanismConfig) -> bool:
    """Whether the pattern is the same for all queries and keys."""
    mechanism = mechanism_of(config)
    return isinstance(config, Dense) or (mechanism is not None and mechanism.token_mask is not None)


def _lists(config: MechanismConfig, view: View, layout: BlockLayout) -> BlockLists:
    if isinstance(config, Dense):
        return _everything(layout)
    lists = None
    if mechanism_of(config) is not None:
        q, k = view.qk or made_up(config, view)
        check_head(view.head, q.shape[1])
        lists = block_lists(config, q, k, grid_thw=view.grid, text=view.text)
    if not isinstance(lists, BlockLists):
        raise ConfigError(
            "this config has no pattern to draw",
            got=repr(config),
            expected="STA(...), or the config of another mechanism that lists blocks",
            next_step="pass the config of one mechanism",
        )
    return lists


def _everything(layout: BlockLayout) -> BlockLists:
    rows = torch.arange(layout.num_blocks).expand(layout.num_blocks, -1)[None, None]
    return BlockLists(rows, torch.full(rows.shape[:3], layout.num_blocks), layout, layout)


def made_up(config: MechanismConfig, view: View) -> tuple[Tensor, Tensor]:
    """Return queries and keys, or zeros where their values do not matter."""
    heads = config.num_heads if isinstance(config, STA) else 1
    if _is_fixed(config):
        shape = (1, heads, sequence_grid(view.grid, view.text.before, view.text.after)[0], 8)
        return torch.zeros(shape), torch.zeros(shape)
    q, k, _ = made_up_tokens(view.grid, heads, HEAD_DIM, text=view.text, seed=view.seed)
    return q, k


def check_head(head: int, heads: int) -> None:
    """Check that there is a head.

    Raises:
        ConfigError: if there is not.
    """
    if not 0 <= head < heads:
        raise ConfigError(
            "no pattern for this head",
            got=f"head {head}",
            expected=f"a head from 0 to {heads - 1}",
            next_step="pass head=0, for instance",
        )


def _mask(lists: BlockLists, head: int) -> Tensor:
    return mark_text(lists.mask(head).to(torch.uint8), lists.queries, lists.keys)


def mark_text(mask: Tensor, queries: BlockLayout, keys: BlockLayout) -> Tensor:
    """Mark the rows and columns of text in a block mask, in place."""
    for axis, layout in enumerate((queries, keys)):
        first = layout.num_text_blocks_before
        blocks = torch.arange(layout.num_blocks)
        is_text = (blocks < first) | (blocks >= first + layout.num_video_blocks)
        mask.index_fill_(axis, blocks[is_text], TEXT)
    return mask


def _tokens(lists: BlockLists, query: int, view: View) -> Tensor:
    seen = lists.mask(view.head)[query]
    tokens = torch.zeros(lists.queries.num_tokens, dtype=torch.uint8)
    for blocks, value in (
        (block_tokens(lists.keys)[seen], SEEN),
        (block_tokens(lists.queries)[query], SHOWN),
    ):
        tokens[blocks[blocks >= 0].long()] = value
    return on_grid(tokens, view)


def on_grid(tokens: Tensor, view: View) -> Tensor:
    """Return the video's part of what is said of each token, shaped like the grid."""
    end = len(tokens) - view.text.after
    return tokens[view.text.before : end].view(view.grid)


def title(config: MechanismConfig, words: Words, view: View, density: float) -> str:
    """Return the title of a picture."""
    what = f"{words.mechanism}, grid {tokens_on(view.grid, view.text)}: density {density:.3f}"
    if _is_fixed(config):
        return what
    if view.qk is None:
        return f"{what}\nAn example, on made-up queries and keys"
    return f"{what}\nHead {view.head} of the given queries and keys"
