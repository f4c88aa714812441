"""Static patterns as integers: windows, visible pairs, density. No tensors."""

from __future__ import annotations

import math
from itertools import chain

from compiled_sparse.layout import BlockLayout
from compiled_sparse.windows import Window
from compiled_sparse.windows import WindowTable


def effective_width(num_tiles: int, nominal: int) -> int:
    """Tiles really covered by a nominal window of `nominal` tiles on an axis of `num_tiles`."""
    return min(2 * (nominal // 2) + 1, num_tiles)


def window_start(num_tiles: int, nominal: int, tile: int) -> int:
    """First tile of the window of query tile `tile`, shifted inwards at the borders."""
    last_start = num_tiles - effective_width(num_tiles, nominal)
    return min(max(tile - nominal // 2, 0), last_start)


def sta_pairs(layout: BlockLayout, window: Window) -> int:
    """Count the (query, key) token pairs one head attends to, text included."""
    text = layout.text_before + layout.text_after
    axes = zip(layout.grid, layout.tile, window, strict=True)
    video = math.prod(_axis_token_pairs(extent, side, k) for extent, side, k in axes)
    return video + layout.num_video_tokens * text + text * layout.num_tokens


def sta_density(layout: BlockLayout, windows: tuple[Window, ...]) -> float:
    """Fraction of (query, key) token pairs attended, averaged over the heads' windows."""
    pairs = sum(sta_pairs(layout, window) for window in windows)
    return pairs / (len(windows) * layout.num_tokens**2)


def table_density(layout: BlockLayout, table: WindowTable) -> tuple[float, float, float]:
    """Mean, least and largest density over the steps and layers of a table."""
    of_window = [sta_density(layout, (window,)) for window in table.windows]
    rows = [sum(map(of_window.__getitem__, row)) / len(row) for row in chain(*table.choice)]
    return sum(rows) / len(rows), min(rows), max(rows)


def swba_density(length: int, block: int, window: int) -> float:
    """Fraction of (query, key) token pairs attended under sliding-window block attention."""
    pairs = 0
    for start in range(0, length, block):
        end = min(start + block, length)
        pairs += (end - start) * (end - max(0, start - (window - 1) * block))
    return pairs / length**2


def top_k_density(layout: BlockLayout, kept: int) -> float:
    """Fraction of token pairs attended where each tile keeps some tiles, and text is attended.

    Which tiles are kept is not known: they are taken to hold as many tokens as tiles do on average.
    """
    video, text = layout.num_video_tokens, layout.text_before + layout.text_after
    pairs = video * video * kept / layout.num_video_blocks + video * text + text * layout.num_tokens
    return pairs / layout.num_tokens**2


def _axis_token_pairs(extent: int, side: int, nominal: int) -> int:
    num_tiles = -(-extent // side)
    sizes = [min(side, extent - tile * side) for tile in range(num_tiles)]
    width = effective_width(num_tiles, nominal)
    pairs = 0
    for tile, size in enumerate(sizes):
        start = window_start(num_tiles, nominal, tile)
        pairs += size * sum(sizes[start : start + width])
    return pairs
