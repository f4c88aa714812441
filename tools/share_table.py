"""Prints the table of docs/plan.md: attention's share in three models, and what that allows.

python tools/share_table.py
"""

from __future__ import annotations

import math

from compiled_sparse.geometry import whole_gain
from compiled_sparse.plan_configs import SPARSITY
from compiled_sparse.presets import geometry
from compiled_sparse.registry import KERNEL_EFFICIENCY

TITLES = ("model", "video", "tokens", "attention", "at sparsity 0.9", "limit")
MODELS = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "hunyuanvideo")
VIDEOS = ((33, 480, 832), (81, 480, 832), (81, 720, 1280), (129, 720, 1280))


def rows() -> list[tuple[str, ...]]:
    """Return the cells of the table, row by row."""
    return [_row(name, video) for name in MODELS for video in VIDEOS]


def _row(name: str, video: tuple[int, int, int]) -> tuple[str, ...]:
    model = geometry(name)
    grid = model.grid_thw(*video)
    share = model.attention_share(grid)
    gain = KERNEL_EFFICIENCY / (1.0 - SPARSITY)
    frames, height, width = video
    return (
        f"`{name}`",
        f"{frames} frames of {height}x{width}",
        f"{model.num_tokens(grid):,}",
        f"{share:.0%}",
        f"{whole_gain(share, gain):.1f}x",
        f"{whole_gain(share, math.inf):.1f}x",
    )


def main() -> None:
    """Print the table as markdown."""
    for cells in (TITLES, ("---",) * len(TITLES), *rows()):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
