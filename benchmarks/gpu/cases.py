"""Which calls of the kernel op are checked: sizes, tiles, dtypes, heads, lists, masks, strides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compiled_sparse.layout import BlockLayout

Extents = tuple[int, ...]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
STRIDES = (
    "BLHD memory",
    "last stride 2",
    "L and D swapped",
    "one head for all",
    "one batch for all",
    "a slice of NaN",
    "every other token",
)


@dataclass(frozen=True, kw_only=True)
class CheckCase:
    """One call that is compared with the reference.

    Args:
        grid: Token grid of the queries.
        q_tile: Tile of the query blocks.
        kv_tile: Tile of the key blocks; None means `q_tile`.
        dtype: Of q, k and v.
        head_dim: Size of a head.
        batch: Batch size.
        heads: Query heads.
        kv_heads: Key heads; None means `heads`.
        text: Text tokens in front and behind.
        key_length: With a grid of one axis, tokens of the keys; None means those of the queries.
        lists: "ragged" (random counts from 0 to all), "full" or "none".
        list_shape: Batch and heads of the lists; None means one list per batch entry and head.
        masked: Whether there is a key mask, with NaN in the keys it hides.
        strides: How q, k and v lie in memory; one of `STRIDES`, or empty for packed.
        grad_strides: The same for the gradient of the output.
        scale: Softmax scale; None for the default.
        magnitude: What q and k are multiplied by.
        variant: Kernels beside the default ones: "boxes" or "pairs" (see `variants`).
    """

    grid: Extents
    q_tile: Extents
    kv_tile: Extents | None = None
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    text: tuple[int, int] = (0, 0)
    key_length: int | None = None
    lists: str = "ragged"
    list_shape: tuple[int, int] | None = None
    masked: bool = False
    strides: str = ""
    grad_strides: str = ""
    scale: float | None = None
    magnitude: float = 1.0
    variant: str = ""

    @property
    def layouts(self) -> tuple[BlockLayout, BlockLayout]:
        """Layouts of queries and keys."""
        kv_grid = self.grid
        if self.key_length is not None:
            kv_grid = (self.key_length - sum(self.text),)
        kv_tile = self.kv_tile or self.q_tile
        return (
            BlockLayout(self.grid, self.q_tile, *self.text),
            BlockLayout(kv_grid, kv_tile, *self.text),
        )

    @property
    def name(self) -> str:
        """The case in words: tile, grid, dtype, head size, and what differs from the defaults."""
        tiles = _times(self.q_tile) + (f"/{_times(self.kv_tile)}" if self.kv_tile else "")
        kind = f"{str(self.dtype).removeprefix('torch.')} D{self.head_dim}"
        parts = [f"tile {tiles} grid {_times(self.grid)} {kind}"]
        for field in dataclasses.fields(self)[5:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name} {value}")
        return ", ".join(parts)


def _times(extents: Extents) -> str:
    return "x".join(map(str, extents))


def check_cases() -> list[CheckCase]:
    """Return all cases, each once."""
    groups = (_basic(), _tiles(), _text(), _features(), _strides(), _variants())
    return list(dict.fromkeys(case for group in groups for case in group))


def quick_cases() -> list[CheckCase]:
    """Return a few tiny cases that reach every branch of the check itself."""
    small = CheckCase(grid=(3, 5, 4), q_tile=(2, 2, 3), head_dim=16, dtype=torch.float32)
    lines = CheckCase(grid=(40,), q_tile=(16,), kv_tile=(10,), key_length=29, head_dim=16)
    return [
        dataclasses.replace(small, text=(3, 5), batch=2, kv_heads=1, masked=True),
        dataclasses.replace(small, lists="full"),
        dataclasses.replace(small, strides="a slice of NaN", grad_strides="one batch for all"),
        dataclasses.replace(small, dtype=torch.bfloat16, kv_tile=(3, 2, 2), list_shape=(1, 1)),
        lines,
        dataclasses.replace(lines, lists="none"),
        dataclasses.replace(lines, variant="pairs"),
    ]


def _basic() -> Iterator[CheckCase]:
    """Every head size in every dtype, on a grid that no tile divides, with text."""
    for head_dim in HEAD_DIMS:
        for dtype in FLOATS:
            yield CheckCase(
                grid=(5, 9, 10), q_tile=(4, 4, 4), dtype=dtype, head_dim=head_dim, text=(7, 77)
            )


def _tiles() -> Iterator[CheckCase]:
    """Every tile on a grid it divides and on one it does not; tiles that differ; one axis."""
    for tile, whole, odd in (
        ((4, 4, 4), (8, 8, 12), (7, 9, 10)),
        ((2, 8, 8), (4, 16, 16), (5, 9, 19)),
        ((6, 8, 8), (12, 8, 16), (7, 9, 17)),
        ((3, 5, 4), (6, 10, 12), (7, 9, 10)),
        ((1, 8, 8), (3, 16, 16), (5, 9, 19)),
    ):
        for grid in (whole, odd):
            yield CheckCase(grid=grid, q_tile=tile, head_dim=128)
        yield CheckCase(grid=odd, q_tile=tile, head_dim=64, dtype=torch.float16)
        yield CheckCase(grid=odd, q_tile=tile, head_dim=64, dtype=torch.float32)
    for run in (64, 128, 60, 100):
        for length in (8 * run, 7 * run + 13):
            yield CheckCase(grid=(length,), q_tile=(run,), head_dim=128)
        yield CheckCase(grid=(5 * run,), q_tile=(run,), key_length=9 * run + 5, heads=1)
        yield CheckCase(grid=(9 * run + 5,), q_tile=(run,), key_length=run - 3, heads=1)
    for q_tile, kv_tile in (
        ((4, 4, 4), (2, 8, 8)),
        ((2, 8, 8), (4, 4, 4)),
        ((6, 8, 8), (4, 4, 4)),
        ((4, 4, 4), (3, 5, 4)),
        ((3, 5, 4), (1, 8, 8)),
    ):
        yield CheckCase(grid=(7, 9, 18), q_tile=q_tile, kv_tile=kv_tile)
    yield CheckCase(grid=(1000,), q_tile=(128,), kv_tile=(64,), head_dim=128)
    yield CheckCase(grid=(1000,), q_tile=(64,), kv_tile=(100,), key_length=777)
    yield CheckCase(grid=(37, 29), q_tile=(8, 8), text=(0, 20))
    yield CheckCase(grid=(2, 3, 2), q_tile=(4, 4, 4))


def _text() -> Iterator[CheckCase]:
    for text in ((77, 0), (0, 256), (1, 1), (130, 64)):
        yield CheckCase(grid=(5, 9, 10), q_tile=(4, 4, 4), text=text, head_dim=128)
    yield CheckCase(grid=(5, 9, 10), q_tile=(3, 5, 4), text=(77, 70))
    yield CheckCase(grid=(5, 9, 10), q_tile=(2, 8, 8), kv_tile=(4, 4, 4), text=(77, 70))
    yield CheckCase(grid=(500,), q_tile=(64,), key_length=900, text=(30, 70))


def _features() -> Iterator[CheckCase]:
    odd = CheckCase(grid=(7, 9, 10), q_tile=(4, 4, 4), text=(7, 77), batch=2)
    for dtype in FLOATS:
        typed = dataclasses.replace(odd, dtype=dtype)
        yield dataclasses.replace(typed, masked=True)
        yield dataclasses.replace(typed, heads=6, kv_heads=2, masked=True)
    for head_dim in (96, 128):
        yield dataclasses.replace(odd, head_dim=head_dim, heads=6, kv_heads=1, masked=True)
    yield dataclasses.replace(odd, q_tile=(2, 8, 8), heads=4, kv_heads=2, masked=True)
    yield dataclasses.replace(odd, q_tile=(3, 5, 4), heads=4, kv_heads=2, masked=True)
    for list_shape in ((1, 1), (2, 1), (1, 2)):
        yield dataclasses.replace(odd, list_shape=list_shape)
        yield dataclasses.replace(odd, list_shape=list_shape, masked=True)
    for lists in ("full", "none"):
        for dtype in FLOATS:
            yield dataclasses.replace(odd, lists=lists, dtype=dtype)
        yield dataclasses.replace(odd, lists=lists, masked=True)
    for scale in (0.0, 1.0, -0.7):
        yield dataclasses.replace(odd, scale=scale)
    yield dataclasses.replace(odd, magnitude=12.0, dtype=torch.float32)
    yield dataclasses.replace(odd, magnitude=5.0)


def _strides() -> Iterator[CheckCase]:
    for strides in STRIDES:
        for tile in ((4, 4, 4), (3, 5, 4)):
            yield CheckCase(
                grid=(5, 9, 10), q_tile=tile, strides=strides, batch=2, heads=3, text=(7, 30)
            )
        yield CheckCase(
            grid=(5, 9, 10), q_tile=(2, 8, 8), grad_strides=strides, batch=2, heads=3, text=(7, 30)
        )


def _variants() -> Iterator[CheckCase]:
    """Kernels that are no default: tiles fetched as boxes, and two blocks in one product."""
    boxes = CheckCase(grid=(5, 9, 10), q_tile=(4, 4, 4), batch=2, kv_heads=1, variant="boxes")
    for head_dim in (16, 80, 128, 256):
        for text in ((0, 0), (7, 77)):
            yield dataclasses.replace(boxes, head_dim=head_dim, text=text)
    for tile in ((2, 8, 8), (4, 8, 8), (1, 8, 8)):
        yield dataclasses.replace(boxes, q_tile=tile, head_dim=128, text=(7, 77))
    yield dataclasses.replace(boxes, grid=(4, 8, 8), head_dim=128, dtype=torch.float16)
    for tile in ((4, 4, 4), (3, 5, 4)):
        yield dataclasses.replace(boxes, q_tile=tile, head_dim=128, text=(7, 77), variant="pairs")
