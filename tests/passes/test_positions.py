"""Packed tokens: a table of positions that rotates queries and keys proves their grid, or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import LENGTH
from modules import POLICY
from modules import Attention
from modules import assert_rewritten
from modules import assert_untouched
from modules import record
from modules import tokens
from torch import Tensor
from torch import nn

import compiled_sparse as cs

Table = Callable[[], Tensor]


def _mesh(*sizes: int, **options: str) -> list[Tensor]:
    counts = [torch.arange(size, dtype=torch.float32) for size in sizes]
    return list(torch.meshgrid(*counts, **{"indexing": "ij", **options}))


def _angles(positions: Tensor) -> Tensor:
    """Turn positions [length, 3] into angles [length, 4]."""
    rates = torch.linspace(0.1, 1.0, 4)
    return (positions[:, :, None] * rates).sum(1)


def _stacked() -> Tensor:
    return _angles(torch.stack(_mesh(*GRID), dim=0).flatten(1).transpose(0, 1))


def _scaled_in_place() -> Tensor:
    grid = torch.stack(_mesh(*GRID), dim=0)[None].repeat(1, 1, 1, 1, 1)
    grid[:, 0:1] = grid[:, 0:1] * 0.5
    return _angles(grid.flatten(2)[0].transpose(0, 1))


def _axis_by_axis() -> Tensor:
    rates = torch.linspace(0.1, 1.0, 4)
    return sum(torch.outer(axis.reshape(-1), rates) for axis in _mesh(*GRID))


def _spread(order: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    rates = torch.linspace(0.1, 1.0, 2)
    tables = []
    for axis in range(3):
        table = torch.outer(torch.arange(GRID[axis]).float(), rates)
        shape = [1, 1, 1, -1]
        shape[axis] = GRID[axis]
        tables.append(table.view(shape).expand(*GRID, -1))
    return torch.cat(tables, -1).permute(*order, 3).reshape(LENGTH, -1)[:, :4]


class Packed(nn.Module):
    """Attention over packed tokens, rotated by a table, with text behind if there is any."""

    def __init__(self, table: Table, keys: Table | None = None) -> None:
        super().__init__()
        self.attn = Attention()
        self.table, self.keys = table, keys or table

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """Attend."""
        angles = iter([self.table(), self.keys()])

        def edit(heads: Tensor) -> Tensor:
            rotated = _rotated(heads[:, :LENGTH], next(angles))
            return torch.cat([rotated, heads[:, LENGTH:]], 1) if text is not None else rotated

        return self.attn(x if text is None else torch.cat([x, text], 1), edit=edit)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


TABLES: dict[str, Table] = {
    "stacked": _stacked,
    "scaled in place": _scaled_in_place,
    "axis by axis": _axis_by_axis,
    "spread over the grid": _spread,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_over_the_grid_proves_the_tokens_it_rotates(table: Table) -> None:
    assert_rewritten(Packed(table), tokens())


def test_tables_made_twice_over_one_grid_are_one_grid() -> None:
    assert_rewritten(Packed(_stacked, _scaled_in_place), tokens())


def test_text_beside_rotated_tokens_is_text() -> None:
    assert_rewritten(Packed(_stacked), tokens(), tokens(1, 7), text=cs.Text(after=7))


def test_the_grid_of_a_table_may_be_dynamic() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor, frames: int, height: int, width: int) -> Tensor:
            table = torch.stack(_mesh(frames, height, width), dim=0).flatten(1).transpose(0, 1)
            return self.attn(x, edit=lambda heads: _rotated(heads, _angles(table)))

    assert_rewritten(Sized(), tokens(), *GRID, dynamic=True)


ELSEWHERE: dict[str, tuple[Table, Table | None]] = {
    "queries only": (_stacked, lambda: torch.zeros(LENGTH, 4)),
    "another grid for keys": (_stacked, lambda: _over(4, 3, 5)),
    "another order for keys": (_stacked, lambda: _spread((0, 2, 1))),
    "an axis of the mesh left out": (lambda: _part_of_a_mesh(), None),
    "axes of the mesh swapped": (lambda: _permuted(), None),
    "shuffled": (lambda: _stacked()[torch.randperm(LENGTH)], None),
    "backwards": (lambda: _stacked().flip(0), None),
    "rolled": (lambda: _stacked().roll(1, 0), None),
    "two halves swapped": (lambda: torch.cat(_stacked().chunk(2)[::-1]), None),
    "cropped": (lambda: _over(4, 4, 5)[:LENGTH], None),
    "a count": (lambda: torch.arange(LENGTH)[:, None] * torch.ones(4), None),
    "the shape of a mesh without its values": (lambda: torch.ones_like(_stacked()), None),
    "counts out of order": (lambda: _shuffled_counts(), None),
    "some rows of a shuffled one": (lambda: _some_shuffled(), None),
    "random numbers": (lambda: torch.rand(LENGTH, 4), None),
}


def _written(write: Callable[[Tensor, Tensor], object]) -> Table:
    """Return the table after something was written to it, given other places for its rows."""

    def table() -> Tensor:
        angles = _stacked().clone()
        write(angles, torch.randperm(LENGTH))
        return angles

    return table


def _put_by_columns(angles: Tensor, places: Tensor) -> None:
    angles[:, :2] = angles[places][:, :2].clone()


SHUFFLED_IN_PLACE: dict[str, Callable[[Tensor, Tensor], object]] = {
    "index_copy_": lambda a, i: a.index_copy_(0, i, a.clone()),
    "index_copy_ through a view": lambda a, i: a.view(LENGTH, 4).index_copy_(0, i, a.clone()),
    "index_copy_ behind dropout": lambda a, i: F.dropout(a, 0.1, training=False).index_copy_(
        0, i, a.clone()
    ),
    "scatter_": lambda a, i: a.scatter_(0, i[:, None].expand(LENGTH, 4), a.clone()),
    "index_put_": lambda a, i: a.index_put_((i,), a.clone()),
    "result": lambda a, i: torch.index_select(a.clone(), 0, i, out=a),
    "numpy": lambda a, i: a.numpy().sort(axis=1),
    "columns": _put_by_columns,
}


@pytest.mark.parametrize("write", SHUFFLED_IN_PLACE.values(), ids=SHUFFLED_IN_PLACE)
def test_a_table_that_was_written_to_proves_nothing(
    write: Callable[[Tensor, Tensor], object],
) -> None:
    model = Packed(_written(write)).requires_grad_(False)
    assert record(model, tokens())[0].outcomes == ["layout_unknown"]


def test_a_table_that_was_written_to_in_a_checkpoint_proves_nothing() -> None:
    def write(angles: Tensor, places: Tensor) -> Tensor:
        rows = angles.clone()
        return angles.index_copy_(0, places, rows).sum()

    def in_a_checkpoint(angles: Tensor, places: Tensor) -> None:
        torch.utils.checkpoint.checkpoint(write, angles, places, use_reentrant=False)

    model = Packed(_written(in_a_checkpoint)).requires_grad_(False)
    assert record(model, tokens())[0].outcomes == ["layout_unknown"]


def _over(*grid: int) -> Tensor:
    return _angles(torch.stack(_mesh(*grid), dim=0).flatten(1).transpose(0, 1))


def _permuted() -> Tensor:
    axes = [axis.permute(0, 2, 1) for axis in _mesh(3, 5, 4)]
    return _angles(torch.stack(axes, dim=0).flatten(1).transpose(0, 1))


def _part_of_a_mesh() -> Tensor:
    frame = torch.stack(_mesh(2, 12, 5), dim=0)[:, 1]
    return _angles(frame.flatten(1).transpose(0, 1))


def _some_shuffled() -> Tensor:
    table = _stacked()
    return torch.where(torch.rand(LENGTH, 1) > 0.5, table, table[torch.randperm(LENGTH)])


def _shuffled_counts() -> Tensor:
    counts = [torch.arange(size)[torch.randperm(size)] for size in GRID]
    mesh = torch.stack(torch.meshgrid(*counts, indexing="ij"), dim=0).float()
    return _angles(mesh.flatten(1).transpose(0, 1))


@pytest.mark.parametrize("table", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_table_that_is_not_over_one_grid_proves_nothing(
    table: tuple[Table, Table | None],
) -> None:
    backend = record(Packed(*table).requires_grad_(False), tokens())[0]
    assert backend.outcomes == ["layout_unknown"]


def test_a_table_that_is_added_proves_nothing() -> None:
    attn = Attention()

    def model(x: Tensor) -> Tensor:
        return attn(x, edit=lambda heads: heads + torch.cat([_stacked()] * 2, -1)[:, None])

    assert_untouched(model, tokens(), reason="layout_unknown")


def test_positions_given_as_an_input_prove_nothing() -> None:
    """The order of tokens that a caller packed and numbered is the caller's business."""
    attn = Attention()

    def model(x: Tensor, places: Tensor) -> Tensor:
        return attn(x, edit=lambda heads: _rotated(heads, _angles(places)))

    places = torch.stack(_mesh(*GRID), dim=0).flatten(1).transpose(0, 1)
    assert_untouched(model, tokens(), places, reason="layout_unknown")


def test_one_table_for_two_sequences_does_not_make_them_one() -> None:
    class Cross(Packed):
        def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
            return self.attn(x, text, edit=lambda heads: _rotated(heads, _stacked()))

    assert_untouched(Cross(_stacked), tokens(), tokens(), reason="layout_unknown")


def test_tokens_moved_after_they_were_rotated_lose_their_place() -> None:
    attn = Attention()

    def model(x: Tensor) -> Tensor:
        return attn(x, edit=lambda heads: _rotated(heads, _stacked()).roll(1, 1))

    assert_untouched(model, tokens(), reason="layout_unknown")


def test_two_tables_in_one_sequence_are_several_grids() -> None:
    attn = Attention()

    def edit(heads: Tensor) -> Tensor:
        first, second = heads[:, :LENGTH], heads[:, LENGTH:]
        return torch.cat([_rotated(first, _stacked()), _rotated(second, _over(4, 3, 5))], 1)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return attn(torch.cat([x, y], 1), edit=edit)

    assert_untouched(model, tokens(), tokens(), reason="several_grids")


def test_an_image_in_two_axes_is_proven_too() -> None:
    policy = cs.STA(window_thw=(1, 1), tile_thw=(2, 3))
    attn = Attention()

    def table() -> Tensor:
        return _angles(torch.stack(_mesh(6, 10), dim=0).flatten(1).transpose(0, 1))

    def model(x: Tensor) -> Tensor:
        return attn(x, edit=lambda heads: _rotated(heads, table()))

    backend = record(model, tokens(), policy=policy)[0]
    assert [d.grid_thw for d in backend.decisions] == [(6, 10)]
    assert record(model, tokens(), policy=POLICY)[0].outcomes == ["axes_mismatch"]
