"""Which shapes, tiles and sparsities are measured, the most important first."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from dataclasses import replace

from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import sta_density
from compiled_sparse.windows import Window

Extents = tuple[int, int, int]

HEAD_DIM = 128
TILES: tuple[Extents, ...] = ((4, 4, 4), (2, 8, 8), (3, 5, 4))
SPARSITIES = (0.9, 0.95, 0.8)
_NEAR = 0.2


@dataclass(frozen=True)
class Shape:
    """The attention of one model, batch 1.

    Args:
        name: The model.
        grid: Its (T, H, W) token grid.
        heads: Number of heads.
        text: Text tokens behind the video.
        head_dim: Size of a head.
    """

    name: str
    grid: Extents
    heads: int
    text: int = 0
    head_dim: int = HEAD_DIM


WAN_14B = Shape("Wan 14B", (21, 45, 80), 40)
WAN_1B = Shape("Wan 1.3B", (21, 30, 52), 12)
HUNYUAN = Shape("HunyuanVideo", (33, 45, 80), 24, text=256)
TINY = Shape("tiny", (3, 6, 9), 2, text=5, head_dim=16)


@dataclass(frozen=True)
class SpeedCase:
    """One measurement.

    Args:
        shape: The model.
        tile: Tile of queries and keys.
        sparsity: Fraction of blocks left out.
        direction: "forward" or "backward".
        pattern: "random" lists per head, or "sta".
        moves: Whether to time moving the tokens into tile order and back, too.
    """

    shape: Shape
    tile: Extents
    sparsity: float = 0.9
    direction: str = "forward"
    pattern: str = "random"
    moves: bool = False

    @property
    def layout(self) -> BlockLayout:
        """Layout of queries and keys."""
        return BlockLayout(self.shape.grid, self.tile, 0, self.shape.text)

    @property
    def selected(self) -> int:
        """How many key blocks a random list has."""
        count = self.layout.num_blocks
        return min(count, math.ceil(round((1 - self.sparsity) * count, 6)))

    @property
    def window(self) -> Window:
        """The most even window among those whose density is near the wanted one.

        Near is within a fifth of it, else what is nearest; even is to cover about the same part of
        every axis.
        """
        layout = self.layout
        wanted = 1 - self.sparsity

        def cost(window: Window) -> tuple[float, ...]:
            off = abs(sta_density(layout, (window,)) / wanted - 1)
            parts = [min(k / n, 1) for k, n in zip(window, layout.tiles_per_axis, strict=True)]
            return max(off, _NEAR), max(parts) / min(parts), off

        odd = [range(1, count + 2, 2) for count in layout.tiles_per_axis]
        return min(itertools.product(*odd), key=cost)

    @property
    def name(self) -> str:
        """The case in a few words."""
        tile = "x".join(map(str, self.tile))
        parts = [self.shape.name, self.direction, f"{self.pattern} {self.sparsity:g} tile {tile}"]
        return " ".join([*parts, *(["and moves"] if self.moves else [])])


def speed_cases() -> list[SpeedCase]:
    """Return all cases in the order in which they are measured."""
    first = [
        SpeedCase(WAN_14B, (4, 4, 4), moves=True),
        SpeedCase(WAN_14B, (2, 8, 8), moves=True),
        SpeedCase(WAN_14B, (4, 4, 4), direction="backward"),
        SpeedCase(WAN_14B, (3, 5, 4)),
        SpeedCase(WAN_14B, (6, 8, 8), pattern="sta"),
        SpeedCase(HUNYUAN, (4, 4, 4), moves=True),
        SpeedCase(WAN_1B, (4, 4, 4), moves=True),
        SpeedCase(WAN_14B, (2, 8, 8), direction="backward"),
        SpeedCase(WAN_14B, (4, 4, 4), 0.95),
        SpeedCase(WAN_14B, (4, 4, 4), 0.8),
        SpeedCase(WAN_14B, (4, 4, 4), pattern="sta"),
        SpeedCase(WAN_1B, (4, 4, 4), direction="backward"),
        SpeedCase(HUNYUAN, (2, 8, 8)),
        SpeedCase(HUNYUAN, (6, 8, 8), pattern="sta"),
        SpeedCase(WAN_1B, (2, 8, 8)),
        SpeedCase(HUNYUAN, (4, 4, 4), direction="backward"),
    ]
    product = itertools.product(
        SPARSITIES, ("forward", "backward"), (WAN_14B, HUNYUAN, WAN_1B), TILES, ("random", "sta")
    )
    rest = [
        SpeedCase(shape, tile, sparsity, direction, pattern)
        for sparsity, direction, shape, tile, pattern in product
    ]
    with_moves = {replace(case, moves=False) for case in first if case.moves}
    return list(dict.fromkeys([*first, *(case for case in rest if case not in with_moves)]))


def quick_cases() -> list[SpeedCase]:
    """Return tiny cases of every kind."""
    return [
        SpeedCase(TINY, (2, 2, 4), 0.5, moves=True),
        SpeedCase(TINY, (2, 2, 4), 0.5, direction="backward"),
        SpeedCase(TINY, (3, 3, 3), 0.5, pattern="sta"),
    ]
