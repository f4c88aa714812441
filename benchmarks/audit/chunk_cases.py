"""The variants of attention over chunks that are audited."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from unittest import mock

import torch

from compiled_sparse.kernels import chunk_attention
from compiled_sparse.kernels import chunk_selection
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import gpu_chunks
from compiled_sparse.ops.bit_masks import words_for

CHUNK = (4, 16, 16)
SMALL_CHUNK = (4, 6, 4)


@dataclass(frozen=True)
class ChunkCase:
    """One call; its name says what is special about it.

    `long` segments are what calls of many tokens and heads have: tiles of more queries.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    tile: tuple[int, int, int] = CHUNK
    grid: tuple[int, int, int] = (9, 16, 15)
    long: bool = True
    masked: bool = False
    groups: int = 1
    precision: str = "ieee"

    boxes = False
    quantized = False


def quick_chunk_cases() -> list[ChunkCase]:
    """Return the variants that most calls use."""
    return [
        ChunkCase("chunks"),
        ChunkCase("chunks of few tokens", tile=SMALL_CHUNK),
        ChunkCase("chunks, short segments", tile=SMALL_CHUNK, long=False),
    ]


def chunk_cases() -> list[ChunkCase]:
    """Return every variant: head sizes by lengths of segments, then the other features."""
    plain, _, short = quick_chunk_cases()
    sized = [replace(case, head_dim=size) for case in (plain, short) for size in (64, 256)]
    features = [
        replace(plain, name="chunks, float16", dtype=torch.float16, head_dim=32),
        replace(plain, name="chunks, key mask, groups", masked=True, groups=2),
        replace(plain, name="chunks of 12 tokens", tile=(2, 2, 3), head_dim=64),
        replace(short, name="chunks, short segments, key mask", head_dim=96, masked=True),
    ]
    float32 = [
        replace(plain, name=f"chunks, {kind}", dtype=torch.float32, precision=kind, head_dim=size)
        for kind, size in (("ieee", 128), ("tf32", 64), ("tf32", 128), ("tf32", 256))
    ]
    return [*quick_chunk_cases(), *sized, *features, *float32]


def chunk_launches(case: ChunkCase) -> Iterator[Callable[[], None]]:
    """Yield functions that launch the forward and the backward of a case."""
    layout = BlockLayout(case.grid, case.tile)
    length, heads = layout.num_tokens, 2 * case.groups

    def tensor(heads: int) -> torch.Tensor:
        shape = (1, length, heads, case.head_dim)
        return torch.zeros(shape, dtype=case.dtype).transpose(1, 2)

    q, k, v, out = tensor(heads), tensor(2), tensor(2), tensor(heads)
    lse = torch.zeros(out.shape[:-1])
    selected = torch.zeros(1, heads, layout.num_blocks, words_for(length), dtype=torch.int32)
    mask = torch.ones(1, length, dtype=torch.bool) if case.masked else None
    rest = (selected, mask, layout, 0.1)

    def forward() -> None:
        with _segments(case):
            gpu_chunks.chunk_forward(q, k, v, *rest, (out, lse))

    def backward() -> None:
        gradients = (q.clone(), k.clone(), v.clone())
        with _segments(case):
            gpu_chunks.chunk_backward(out, None, q, k, v, out, lse, *rest, gradients)

    yield forward
    yield backward


def selection_launches(case: ChunkCase) -> Iterator[Callable[[], None]]:
    """Yield functions that launch what selects the chunks of a case for each query."""
    layout = BlockLayout(case.grid, case.tile)
    heads, tokens, chunks = 2 * case.groups, layout.num_tokens, layout.num_blocks
    gates, own = torch.zeros(heads, chunks, tokens), torch.zeros(tokens, dtype=torch.int32)
    shown = torch.ones(chunks, dtype=torch.bool), torch.ones(tokens, dtype=torch.bool)
    selected = torch.zeros(heads, chunks, words_for(tokens), dtype=torch.int32)
    selection = chunk_selection.Selection(gates, own, shown if case.masked else None, 0, 0)
    for rule in (3, torch.zeros((), dtype=torch.float64)):
        yield lambda rule=rule: chunk_selection.select(selection, rule, selected)  # type: ignore[misc]


def _segments(case: ChunkCase) -> mock._patch[int]:
    fewest = chunk_attention.MOST_WORDS if case.long else 1
    return mock.patch.object(chunk_attention, "FEWEST_WORDS", fewest)
