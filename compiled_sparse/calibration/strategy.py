"""A strategy: which window each head of each layer has at each step, and its published file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from itertools import islice
from itertools import product
from pathlib import Path
from typing import Any

from compiled_sparse.calibration.documents import read_published
from compiled_sparse.calibration.documents import refusal
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.tables import NUM_AXES
from compiled_sparse.calibration.tables import Place
from compiled_sparse.calibration.tables import Table
from compiled_sparse.calibration.tables import as_table
from compiled_sparse.calibration.tables import as_window
from compiled_sparse.calibration.tables import items
from compiled_sparse.calibration.tables import make_table
from compiled_sparse.calibration.tables import shape_of
from compiled_sparse.config import is_count
from compiled_sparse.errors import CalibrationError
from compiled_sparse.pattern import effective_width
from compiled_sparse.windows import Window
from compiled_sparse.windows import WindowTable

_WHAT = "strategy"
_KEY = re.compile("_".join(3 * ["(0|[1-9][0-9]*)"]))  # "01_0_0" would hide "1_0_0"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Which window each head of each layer has at each step.

    Args:
        windows: Windows (T, H, W) in tiles, nested `[steps][layers][heads]`, none left out.

    Raises:
        CalibrationError: if a list is empty, lengths differ, or a window is not made of three
            positive integers.
    """

    windows: Table[Window]

    def __post_init__(self) -> None:
        table = as_table(self.windows)
        bad = [] if table is None else [at for at, value in items(table) if not as_window(value)]
        if table is None or bad:
            shown = "{}_{}_{}".format(*bad[0]) if bad else "empty or of different lengths"
            raise CalibrationError(
                "Strategy.windows is not a full table of windows",
                got=f"no window at {shown}" if bad else f"lists that are {shown}",
                expected="[steps][layers][heads] of three positive integers",
                next_step="write windows=[[[(3, 3, 3)]]] for one step, layer and head",
            )
        windows = tuple(tuple(tuple(map(tuple, row)) for row in layers) for layers in table)
        object.__setattr__(self, "windows", windows)

    @property
    def shape(self) -> Place:
        """How many steps, layers and heads there are."""
        return shape_of(self.windows)

    @classmethod
    def from_published(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        steps: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
    ) -> Strategy:
        """Read a strategy of the published form: `{"<step>_<layer>_<head>": [kt, kh, kw], ...}`.

        Args:
            source: The path of the JSON file, or what is in it.
            steps: How many steps it must have; all three sizes or none are given. Without them
                the largest index of each kind says it.
            layers: How many layers.
            heads: How many heads.

        Raises:
            ConfigFormatError: if the file cannot be read.
            CalibrationError: if it is not of that form, an entry is missing or outside the sizes,
                or some of the sizes are given only.
        """
        document, origin = read_published(source, _WHAT)
        entries = {_place(key, origin): value for key, value in document.items()}
        sizes = _sizes((steps, layers, heads), entries, origin)
        _check_places(entries, sizes, origin)
        for place, value in entries.items():
            if as_window(value) is None:
                reason = f"{_key(place)} is {value!r}"
                raise refusal(origin, _WHAT, reason, "three positive integers, [kt, kh, kw]")
        return cls(windows=make_table(sizes, lambda *place: entries[place]))

    def to_published(self) -> dict[str, list[int]]:
        """Return the strategy in the published form, as JSON values."""
        return {_key(place): list(window) for place, window in items(self.windows)}

    def save(self, path: str | Path) -> None:
        """Write the strategy in the published form.

        A file that is there is replaced, and folders that are not there are made.

        Raises:
            CalibrationError: if it cannot be written.
        """
        write_atomically(path, json.dumps(self.to_published(), indent=4), make_folders=True)

    def to_table(self) -> WindowTable:
        """Return the strategy as `STA(window_thw=...)` takes it."""
        palette = {window: i for i, window in enumerate(dict.fromkeys(self._all()))}
        choice = make_table(self.shape, lambda t, i, h: palette[self.windows[t][i][h]])
        return WindowTable(windows=tuple(palette), choice=choice)

    @classmethod
    def from_table(cls, table: WindowTable) -> Strategy:
        """Return the strategy that a table holds, of as many steps, layers and heads.

        Raises:
            CalibrationError: if its windows have not three axes.
        """
        if len(table.windows[0]) != NUM_AXES:
            raise CalibrationError(
                "a strategy is for videos",
                got=f"windows of {len(table.windows[0])} axes, {table.windows[0]} for instance",
                expected="windows of 3 axes (T, H, W)",
                next_step="keep it as a WindowTable, which has a JSON form as part of its config",
            )
        steps, layers = range(table.num_steps), range(table.num_layers)
        return cls(windows=tuple(tuple(table.row(t, i) for i in layers) for t in steps))

    def usage(self) -> dict[Window, int]:
        """Return how many heads of all layers and steps have each window, most used first."""
        return dict(Counter(self._all()).most_common())

    def nominal_sparsity(self, full_window: Window) -> float:
        """Return the published number: tiles left out of the full window, by nominal sizes.

        Args:
            full_window: The window that counts as dense.

        Raises:
            CalibrationError: if it is not made of three positive integers.
        """
        full = require_window(full_window, "full_window")
        return 1 - sum(map(math.prod, self._all())) / (math.prod(self.shape) * math.prod(full))

    def effective_sparsity(self, num_tiles: Window) -> float:
        """Return the fraction of pairs of video tiles that is really left out.

        An even window acts as the next odd one, and none is wider than its axis.

        Args:
            num_tiles: Tiles per axis (T, H, W), partial ones included.

        Raises:
            CalibrationError: if they are not three positive integers.
        """
        tiles = require_window(num_tiles, "num_tiles")
        kept = sum(
            count * math.prod(map(effective_width, tiles, window))
            for window, count in self.usage().items()
        )
        return 1 - kept / (math.prod(self.shape) * math.prod(tiles))

    def _all(self) -> chain[Window]:
        return chain.from_iterable(chain.from_iterable(self.windows))


def require_window(value: Any, name: str) -> Window:
    """Return three positive integers as a tuple.

    Raises:
        CalibrationError: naming the argument `name`, if `value` is anything else.
    """
    window = as_window(value)
    if window is None:
        raise CalibrationError(
            f"{name} is not made of three positive integers",
            got=repr(value),
            expected="three integers of at least 1, (T, H, W) in tiles",
            next_step=f"pass {name}=(3, 6, 10), for instance",
        )
    return window


def _key(place: tuple[int, ...]) -> str:
    return "_".join(map(str, place))


def _place(key: Any, origin: str) -> Place:
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise refusal(
            origin, _WHAT, f"key {key!r}", '"<step>_<layer>_<head>", "0_12_3" for instance'
        )
    step, layer, head = map(int, match.groups())
    return step, layer, head


def _sizes(
    given: tuple[int | None, int | None, int | None], entries: Mapping[Place, Any], origin: str
) -> Place:
    """Return how many steps, layers and heads there should be."""
    if given == (None, None, None) and entries:
        steps, layers, heads = (1 + max(indices) for indices in zip(*entries, strict=True))
        return steps, layers, heads
    sizes = [size for size in given if size is not None and is_count(size)]
    if len(sizes) < len(given):
        raise CalibrationError(
            "sizes of a strategy are incomplete",
            got="steps={}, layers={}, heads={}".format(*given)
            + f", and {len(entries)} entries in {origin}",
            expected="all three as integers of at least 1; or none, and entries",
            next_step="pass all three, as those of the model, or none",
        )
    return sizes[0], sizes[1], sizes[2]


def _check_places(entries: Mapping[Place, Any], sizes: Place, origin: str) -> None:
    """Check that there is an entry at every place, and none anywhere else."""
    expected = "{} steps x {} layers x {} heads, each once".format(*sizes)
    outside = [p for p in entries if any(i >= size for i, size in zip(p, sizes, strict=True))]
    if outside:
        raise refusal(origin, _WHAT, f"{_listed(outside)} outside the sizes", expected)
    num_missing = math.prod(sizes) - len(entries)
    if num_missing:
        places = product(*map(range, sizes))
        first = list(islice((place for place in places if place not in entries), _SHOWN + 1))
        raise refusal(origin, _WHAT, f"{num_missing} missing: {_listed(first)}", expected)


def _listed(places: Sequence[tuple[int, ...]]) -> str:
    more = ", ..." if len(places) > _SHOWN else ""
    return ", ".join(map(_key, places[:_SHOWN])) + more
