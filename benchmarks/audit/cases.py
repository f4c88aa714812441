"""The kernel variants that are audited: calls of the op, small, on tensors nobody computes with."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch

from compiled_sparse.kernels import pooling
from compiled_sparse.kernels import top_k
from compiled_sparse.kernels.attention import Sides
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import gpu
from compiled_sparse.ops import gpu_quantized

TILES: tuple[Sides, ...] = ((4, 4, 4), (2, 8, 8), (6, 8, 8), (3, 5, 4))
BOX_TILES: tuple[Sides, ...] = ((4, 4, 4), (2, 8, 8), (4, 8, 8))


@dataclass(frozen=True)
class Case:
    """One call; its name says what is special about it."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    tile: Sides = (4, 4, 4)
    grid: Sides = (8, 16, 16)
    text: int = 0
    masked: bool = False
    groups: int = 1
    precision: str = "ieee"
    boxes: bool = False
    kv_tile: Sides | None = None
    quantized: bool = False

    @property
    def layouts(self) -> tuple[BlockLayout, BlockLayout]:
        """Layouts of queries and keys."""
        text = (0, self.text)
        return (
            BlockLayout(self.grid, self.tile, *text),
            BlockLayout(self.grid, self.kv_tile or self.tile, *text),
        )


def quick_cases() -> list[Case]:
    """Return the variants that most calls use."""
    return [
        Case("tile 4x4x4"),
        Case("tile 2x8x8", tile=(2, 8, 8)),
        Case("boxes 4x4x4", boxes=True),
        *_published_quantized(),
    ]


def all_cases() -> list[Case]:
    """Return every variant: head sizes by tiles, then one for each other feature."""
    plain = Case("plain")
    sizes = [(128, tile) for tile in TILES] + [(64, (4, 4, 4)), (64, (6, 8, 8)), (256, (4, 4, 4))]
    features = [
        replace(plain, name="float16", dtype=torch.float16),
        replace(plain, name="text, key mask, groups", text=77, masked=True, groups=2),
        replace(plain, name="head size 16", head_dim=16),
        replace(plain, name="head size 32", head_dim=32),
        replace(plain, name="head size 96", head_dim=96),
        replace(plain, name="tile 2x2x4", tile=(2, 2, 4)),
        replace(plain, name="grid not divided", grid=(7, 15, 13)),
    ]
    float32 = [
        replace(plain, name=precision, dtype=torch.float32, precision=precision, head_dim=size)
        for precision in ("ieee", "tf32")
        for size in (128, 256)
    ]
    return [
        *(_sized(*size) for size in sizes),
        *features,
        *float32,
        *_box_cases(),
        *_published_quantized(),
        *_quantized_cases(),
    ]


def _sized(head_dim: int, tile: Sides) -> Case:
    return Case(f"tile {_times(tile)}", tile=tile, head_dim=head_dim)


def _box_cases() -> list[Case]:
    sizes = [(128, tile) for tile in BOX_TILES] + [(64, (4, 4, 4)), (256, (4, 4, 4))]
    texts = [
        Case(f"boxes {_times(tile)}, text", tile=tile, boxes=True, text=77) for tile in BOX_TILES
    ]
    return [
        Case(f"boxes {_times(tile)}", tile=tile, head_dim=head_dim, boxes=True)
        for head_dim, tile in sizes
    ] + texts


def _published_quantized() -> list[Case]:
    runs = Case("quantised 128 by 64", grid=(1, 1, 2048), quantized=True)
    one, other = (1, 1, 128), (1, 1, 64)
    return [
        replace(runs, tile=one, kv_tile=other),
        replace(runs, name="quantised 64 by 128", tile=other, kv_tile=one),
    ]


def _quantized_cases() -> Iterator[Case]:
    for case in _published_quantized():
        yield replace(case, head_dim=64)
        yield replace(case, name=f"{case.name}, text, key mask", text=77, masked=True, groups=2)
        yield replace(case, name=f"{case.name}, float32", dtype=torch.float32, head_dim=64, text=77)
    for tile in (*TILES, (2, 2, 4)):
        yield Case(f"quantised {_times(tile)}", tile=tile, quantized=True)
        yield Case(f"quantised {_times(tile)}, text", tile=tile, quantized=True, text=77)


def _times(sides: Sides) -> str:
    return "x".join(map(str, sides))


def launch_helpers(case: Case) -> None:
    """Launch the kernels that block selectors use, on the tensors of a case."""
    layout = BlockLayout(case.grid, case.tile, text_after=case.text)
    x = torch.zeros(1, 2, layout.num_tokens, case.head_dim, dtype=case.dtype)
    means = x.new_zeros(1, 2, layout.num_blocks, case.head_dim)
    pooling.tile_mean(x, case.grid, case.tile, (0, case.text), layout.num_blocks, means)
    scores = x.new_zeros(1, 2, 64, layout.num_blocks)
    indices = torch.zeros(1, 2, 64, 5, dtype=torch.int32)
    counts = torch.zeros(1, 2, 64, dtype=torch.int32)
    for limit in (None, torch.tensor(3)):
        top_k.top_k_blocks(scores, limit, indices, counts)


def launches(case: Case) -> Iterator[Callable[[], None]]:
    """Yield functions that launch the forward and the backward of a case."""
    layouts = case.layouts
    length = layouts[0].num_tokens
    heads = 2 * case.groups

    def tensor(heads: int) -> torch.Tensor:
        shape = (1, length, heads, case.head_dim)
        return torch.zeros(shape, dtype=case.dtype).transpose(1, 2)

    q, k, v, out = tensor(heads), tensor(2), tensor(2), tensor(heads)
    lse = torch.zeros(out.shape[:-1], dtype=torch.promote_types(case.dtype, torch.float32))
    indices = torch.zeros(1, heads, layouts[0].num_blocks, 4, dtype=torch.int32)
    counts = torch.full(indices.shape[:-1], 4, dtype=torch.int32)
    mask = torch.ones(1, length, dtype=torch.bool) if case.masked else None
    lists = (indices, counts, mask, *layouts, 0.1)

    if case.quantized:
        yield lambda: gpu_quantized.quantized_forward(q, k, v, *lists, "auto", (out, lse))
        return
    yield lambda: gpu.block_sparse_forward(q, k, v, *lists, (out, lse))
    yield lambda: gpu.block_sparse_backward(
        out, None, q, k, v, out, lse, *lists, (q.clone(), k.clone(), v.clone())
    )
