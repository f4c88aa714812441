"""Windows and nested tables as published files hold them."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import TypeVar

from compiled_sparse.config import is_count
from compiled_sparse.windows import Window

Item = TypeVar("Item")
Table = tuple[tuple[tuple[Item, ...], ...], ...]  # [steps][layers][heads]
Place = tuple[int, int, int]  # step, layer, head

NUM_AXES = 3

_WINDOW = re.compile(r"\s*([0-9]+)\s*,\s*([0-9]+)\s*,\s*([0-9]+)\s*")


def as_window(value: Any) -> Window | None:
    """Return a list or tuple of three positive integers as a tuple, and None for anything else."""
    is_triple = isinstance(value, list | tuple) and len(value) == NUM_AXES
    return tuple(value) if is_triple and all(map(is_count, value)) else None


def window_from_text(text: str) -> Window | None:
    """Return the window written "3, 1, 10", or None if that is not what it is."""
    match = _WINDOW.fullmatch(text)
    return as_window([int(side) for side in match.groups()]) if match else None


def as_table(value: Any) -> Table[Any] | None:
    """Return lists nested [steps][layers][heads] as tuples; None if empty or of unequal lengths."""
    if not _is_filled([value]) or not _is_filled(value):
        return None
    rows = [row for layers in value for row in layers]
    if not _is_filled(rows):
        return None
    return tuple(tuple(map(tuple, layers)) for layers in value)


def _is_filled(lists: Any) -> bool:
    """Whether these are lists of one length, which is not 0."""
    return all(isinstance(each, list | tuple) and each for each in lists) and (
        len(set(map(len, lists))) == 1
    )


def make_table(shape: Place, item_at: Callable[[int, int, int], Item]) -> Table[Item]:
    """Return the table whose items are made of step, layer and head."""
    steps, layers, heads = map(range, shape)
    return tuple(tuple(tuple(item_at(t, i, h) for h in heads) for i in layers) for t in steps)


def shape_of(table: Table[Any]) -> Place:
    """Return how many steps, layers and heads a table has."""
    return len(table), len(table[0]), len(table[0][0])


def items(table: Table[Item]) -> Iterator[tuple[Place, Item]]:
    """Return step, layer and head of everything in a table, and what is there."""
    for t, layers in enumerate(table):
        for layer, heads in enumerate(layers):
            for head, item in enumerate(heads):
                yield (t, layer, head), item
