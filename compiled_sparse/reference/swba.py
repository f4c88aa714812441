"""Sliding-window block attention: which tokens see which."""

from __future__ import annotations

from torch import Tensor

from compiled_sparse.config import SWBA


def swba_token_mask(
    config: SWBA, queries: Tensor, keys: Tensor, grid: tuple[int, ...], tile: tuple[int, ...]
) -> Tensor:
    """Return which keys each query sees: its own block and the `window - 1` before it.

    Args:
        config: Block and window.
        queries: Query positions in the sequence.
        keys: Key positions, likewise.
        grid: The sequence's length.
        tile: The block.

    Returns:
        bool [1, queries, keys].
    """
    distance = (queries // config.block)[:, None] - (keys // config.block)[None, :]
    return ((distance >= 0) & (distance < config.window))[None]
