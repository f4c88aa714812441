"""The tile order of FastVideo, and the arithmetic of its sparsities, against loops over tokens."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts

import compiled_sparse as cs
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MetadataError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.sparsity import num_selected
from compiled_sparse.sparsity import sparsity_ramp
from compiled_sparse.tile_order import TileOrder

CASES = [
    ((5, 7, 3), (4, 4, 4)),
    ((9, 10, 7), (4, 4, 4)),
    ((6, 8, 16), (4, 4, 4)),
    ((4, 4, 4), (4, 4, 4)),
    ((5, 4, 4), (4, 4, 4)),
    ((5, 32, 32), (4, 4, 4)),
    ((2, 3, 1), (4, 4, 4)),
    ((9, 10, 7), (2, 8, 4)),
    ((13, 9, 11), (6, 8, 8)),
    ((7, 10), (4, 4)),
    ((21,), (8,)),
]


def padded_slots(grid: tuple[int, ...], tile: tuple[int, ...]) -> list[list[int]]:
    """The tokens of each tile, by asking every token of a three-axis grid where it belongs."""
    (frames, height, width), (a, b, c) = (
        (1,) * (3 - len(extents)) + extents for extents in (grid, tile)
    )
    rows, columns = (height + b - 1) // b, (width + c - 1) // c
    tiles: list[list[int]] = [[] for _ in range((frames + a - 1) // a * rows * columns)]
    token = 0
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                tiles[(t // a * rows + h // b) * columns + w // c].append(token)
                token += 1
    return tiles


@pytest.mark.parametrize(("grid", "tile"), CASES, ids=str)
def test_the_order_is_that_of_a_loop_over_tokens(
    grid: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    order, tiles = TileOrder(grid, tile), padded_slots(grid, tile)
    volume = torch.Size(tile).numel()
    slot_of, place_of = {}, {}
    for number, tokens in enumerate(tiles):
        for i, token in enumerate(tokens):
            place_of[token] = len(place_of)
            slot_of[token] = number * volume + i
    assert order.tile_partition_indices == tuple(place_of)
    length = torch.Size(grid).numel()
    assert order.reverse_tile_partition_indices == tuple(place_of[i] for i in range(length))
    assert order.variable_block_sizes == tuple(map(len, tiles))
    assert order.non_pad_index == tuple(slot_of.values())
    assert order.untile_combined_index == tuple(slot_of[i] for i in range(length))
    assert order.total_seq_length == length
    assert order.total_num_tiles == len(tiles)
    assert order.max_block_size == volume


@given(layouts(), st.integers(1, 3), st.integers(1, 2))
def test_untiling_a_tiled_tensor_gives_it_back(layout: BlockLayout, heads: int, batch: int) -> None:
    order = TileOrder.of_grid(layout.grid, layout.tile)
    x = torch.randn(batch, order.total_seq_length, heads, 2)
    slots = order.total_num_tiles * order.max_block_size
    buffer = torch.zeros(batch, slots, heads, 2)
    buffer[:, list(order.non_pad_index)] = x[:, list(order.tile_partition_indices)]
    assert torch.equal(buffer[:, list(order.untile_combined_index)], x)
    padding = sorted(set(range(slots)) - set(order.non_pad_index))
    assert not buffer[:, padding].any()
    sums = buffer.unflatten(1, (order.total_num_tiles, -1)).sum(2)
    naive = [x[:, tokens].sum(1) for tokens in padded_slots(layout.grid, layout.tile)]
    torch.testing.assert_close(sums, torch.stack(naive, 1))


@given(layouts())
def test_the_reverse_order_undoes_the_order(layout: BlockLayout) -> None:
    order = TileOrder.of_grid(layout.grid, layout.tile)
    indices = order.tile_partition_indices
    places = order.reverse_tile_partition_indices
    assert [indices[i] for i in places] == list(range(order.total_seq_length))
    assert sum(order.variable_block_sizes) == order.total_seq_length


def test_latents_are_counted_in_whole_patches_and_tiles_per_axis() -> None:
    order = cs.layout.tile_order(torch.zeros(1, 16, 21, 61, 105).shape[2:], (1, 2, 2))
    assert order == TileOrder((21, 30, 52), (4, 4, 4))
    assert order.grid_thw == (21, 30, 52)
    assert order.num_tiles == (6, 8, 13)
    assert order.total_num_tiles == 6 * 8 * 13
    assert hash(order) == hash(TileOrder.of_grid([21, 30, 52], torch.Size((4, 4, 4))))


def test_the_tile_can_be_chosen_and_its_volume_counts_where_no_tile_is_full() -> None:
    order = cs.layout.tile_order([3, 6, 10], [1, 2, 2], tile_thw=[4, 8, 8])
    assert order.num_tiles == (1, 1, 1)
    assert order.variable_block_sizes == (45,)
    assert order.max_block_size == 256


def test_importing_the_order_needs_no_torch() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('compiled_sparse'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules.update(compiled_sparse=package, torch=None, numpy=None)\n"
        "from compiled_sparse.layout import tile_order\n"
        "print(tile_order((5, 7, 3), (1, 1, 1)).num_tiles)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, cs.__path__[0]], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(2, 2, 1)"


@pytest.mark.parametrize(
    ("tiles", "sparsity", "kept"),
    [(10, 0.7, 4), (10, 0.4, 6), (20, 0.85, 4), (7, 0.0, 7), (7, 1.0, 1), (1, 0.9, 1), (2, 1, 1)],
)
def test_the_number_of_selected_tiles_rounds_as_floats_do(
    tiles: int, sparsity: float, kept: int
) -> None:
    assert num_selected(tiles, sparsity) == kept
    assert TileOrder((tiles,), (1,)).top_k(sparsity) == kept


@given(st.integers(1, 5000), st.floats(0, 1))
def test_at_least_one_tile_is_selected_and_never_more_than_there_are(
    tiles: int, sparsity: float
) -> None:
    assert 1 <= num_selected(tiles, sparsity) <= tiles
    assert num_selected(tiles, 0.0) == tiles


def test_partial_tiles_count_as_whole_ones() -> None:
    assert TileOrder((5, 7, 3), (4, 4, 4)).top_k(0.5) == 2


@pytest.mark.parametrize(
    ("step", "target", "rate", "interval", "expected"),
    [
        (0, 0.9, 0.1, 1, 0.0),
        (8, 0.9, 0.1, 1, 0.8),
        (100, 0.9, 0.1, 1, 0.9),  # 0.9 // 0.1 is 8.0: counting the increases would stop at 0.8
        (29, 0.9, 0.03, 1, 0.03 * 29),
        (31, 0.9, 0.03, 1, 0.9),
        (99, 0.8, 0.02, 50, 0.02),
        (100, 0.8, 0.02, 50, 0.04),
        (10**6, 0.8, 0.02, 50, 0.8),
        (3, 0, 0.1, 1, 0.0),
    ],
)
def test_sparsity_grows_in_steps_and_reaches_its_target(
    step: int, target: float, rate: float, interval: int, expected: float
) -> None:
    found = sparsity_ramp(step, target=target, rate=rate, interval=interval)
    assert found == expected
    assert isinstance(found, float)


def test_sparsity_grows_by_a_hundredth_per_step_unless_told_otherwise() -> None:
    assert [sparsity_ramp(n, target=0.025) for n in range(4)] == [0.0, 0.01, 0.02, 0.025]


@pytest.mark.parametrize(
    ("shape", "patch", "tile"),
    [
        ((1, 16, 4, 8, 8), (1, 2, 2), (4, 4, 4)),
        (7, (1, 2, 2), (4, 4, 4)),
        ((4, 8, 8), 2, (4, 4, 4)),
        ((4, 8, 8), (1, 0, 2), (4, 4, 4)),
        ((4, 8.0, 8), (1, 2, 2), (4, 4, 4)),
        ((4, 1, 8), (1, 2, 2), (4, 4, 4)),
        ((4, 8, 8), (1, 2, 2), (4, 4)),
        ((4, 8, 8), (1, 2, 2), 64),
        ((4, 8, 8), (1, 2, 2), (4, 4, -4)),
    ],
    ids=str,
)
def test_what_is_no_shape_is_refused(shape: Any, patch: Any, tile: Any) -> None:
    with pytest.raises(LayoutError):
        cs.layout.tile_order(shape, patch, tile_thw=tile)


@pytest.mark.parametrize(
    ("grid", "tile"), [((4, 4), (4, 4, 4)), ((0, 4), (4, 4)), ([4, 4], (4, 4))], ids=str
)
def test_an_order_of_what_is_no_grid_is_refused(grid: Any, tile: Any) -> None:
    with pytest.raises(LayoutError):
        TileOrder(grid, tile)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", None, True], ids=repr)
def test_a_sparsity_that_is_no_fraction_is_refused(value: Any) -> None:
    with pytest.raises(MetadataError, match="sparsity is out of range"):
        num_selected(8, value)
    with pytest.raises(MetadataError, match="target is out of range"):
        sparsity_ramp(1, target=value)


@pytest.mark.parametrize(
    "wrong",
    [{"step": -1}, {"step": 1.5}, {"rate": 0}, {"rate": -1.0}, {"interval": 0}, {"interval": 2.0}],
    ids=str,
)
def test_a_ramp_of_impossible_numbers_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MetadataError, match=f"{next(iter(wrong))} is out of range"):
        sparsity_ramp(**{"step": 1, "target": 0.5, **wrong})


@pytest.mark.parametrize("value", [0, -3, 2.0, True], ids=repr)
def test_a_number_of_tiles_that_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(MetadataError, match="num_tiles is out of range"):
        num_selected(value, 0.5)
