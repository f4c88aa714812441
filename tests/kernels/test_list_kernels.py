"""Transposed lists and the order of rows against Python loops."""

from __future__ import annotations

import helpers
import pytest
import torch

from compiled_sparse.kernels.lists import heavy_first
from compiled_sparse.kernels.lists import transpose_lists

pytestmark = pytest.mark.usefixtures("poisoned_memory", "gpu_kernels_on_cpu")


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3), (17, 40), (33, 9)])
def test_transposed_lists_name_every_row_once_and_in_order(rows: int, blocks: int) -> None:
    indices, counts = helpers.random_lists((2, 2), rows, blocks)
    entries, starts = transpose_lists(indices, counts, blocks)
    assert entries.dtype == starts.dtype == torch.int32
    for b in range(2):
        for h in range(2):
            listed = [
                row[:n]
                for row, n in zip(indices[b, h].tolist(), counts[b, h].tolist(), strict=True)
            ]
            for block in range(blocks):
                first, last = starts[b, h, block : block + 2].tolist()
                expected = [row for row, named in enumerate(listed) if block in named]
                assert entries[b, h, first:last].tolist() == expected


def test_lists_without_entries_have_empty_transposes() -> None:
    indices = torch.zeros(1, 1, 4, 0, dtype=torch.int32)
    counts = torch.zeros(1, 1, 4, dtype=torch.int32)
    assert transpose_lists(indices, counts, 3).starts.tolist() == [[[0, 0, 0, 0]]]


def test_an_index_out_of_range_marks_nothing_else() -> None:
    indices = torch.tensor([[[[0, 7, -1]]]], dtype=torch.int32)
    counts = torch.tensor([[[3]]], dtype=torch.int32)
    entries, starts = transpose_lists(indices, counts, 2)
    assert starts.tolist() == [[[0, 1, 1]]]
    assert entries[0, 0, 0] == 0


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_rows_with_long_lists_come_first_and_neighbours_stay_together(rows: int) -> None:
    most = 16
    counts = torch.randint(0, most + 1, (1, 2, rows), dtype=torch.int32)
    order = heavy_first(counts, most)
    for head in range(2):
        classes = [-((8 * n - 1) // most) if n else 0 for n in counts[0, head].tolist()]
        expected = sorted(range(rows), key=lambda row: classes[row])
        assert order[0, head].tolist() == expected


def test_lists_of_one_length_keep_their_order() -> None:
    counts = torch.full((1, 1, 21), 5, dtype=torch.int32)
    assert heavy_first(counts, 5).flatten().tolist() == list(range(21))
