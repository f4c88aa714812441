"""Windows that differ by step, layer and head: a palette and a table of choices. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError

Window = tuple[int, ...]
Choice = tuple[tuple[tuple[int, ...], ...], ...]

_FIELDS = ("windows", "choice")


@dataclass(frozen=True, kw_only=True)
class WindowTable:
    """Which window each head of each layer has at each step; accepted as `STA(window_thw=...)`.

    At run time the table is a tensor: another step picks another row, and compiles nothing.

    Args:
        windows: The different windows in tiles per axis, all with the same number of axes.
        choice: Indices into `windows`, nested `[steps][layers][heads]`. A dimension of size 1
            holds for all; a step or layer past the end has the last row.

    Raises:
        ConfigError: if a window is not made of positive integers, or the table is ragged, empty or
            points outside `windows`.
    """

    windows: tuple[Window, ...]
    choice: Choice

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", as_tuples(self.windows))
        object.__setattr__(self, "choice", as_tuples(self.choice))
        _check_windows(self.windows)
        if not _is_table(self.choice, len(self.windows)):
            raise ConfigError(
                "WindowTable.choice is not a full table of indices",
                got=_shorten(repr(self.choice)),
                expected=f"[steps][layers][heads] of indices from 0 to {len(self.windows) - 1}",
                next_step="write choice=[[[0]]] for one window everywhere, and give every step as "
                "many layers, every layer as many heads",
            )

    @property
    def num_steps(self) -> int:
        """Rows of steps; 1 holds for all steps."""
        return len(self.choice)

    @property
    def num_layers(self) -> int:
        """Layers; 1 holds for all layers."""
        return len(self.choice[0])

    @property
    def num_heads(self) -> int:
        """Heads; 1 holds for all heads."""
        return len(self.choice[0][0])

    def row(self, step: int = 0, layer: int = 0) -> tuple[Window, ...]:
        """Return the windows at a step in a layer: one for all heads, or one per head."""
        layers = self.choice[min(step, self.num_steps - 1)]
        return tuple(self.windows[i] for i in layers[min(layer, self.num_layers - 1)])

    def rows(self) -> tuple[tuple[Window, ...], ...]:
        """Return the windows of every step and layer, repetitions included."""
        steps, layers = range(self.num_steps), range(self.num_layers)
        return tuple(self.row(step, layer) for step in steps for layer in layers)

    def heads(self, first: int, last: int) -> WindowTable:
        """Return the table of some of the heads, from the first to the one behind the last."""
        if self.num_heads == 1:
            return self
        choice = tuple(tuple(heads[first:last] for heads in layers) for layers in self.choice)
        return WindowTable(windows=self.windows, choice=choice)

    def describe(self) -> str:
        """Return the table in a few characters, for reports."""
        sizes = f"{self.num_steps} steps x {self.num_layers} layers x {self.num_heads} heads"
        return f"table({len(self.windows)} windows for {sizes})"

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {"windows": self.windows, "choice": self.choice}

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> WindowTable:
        """Build a table from what `to_dict` returned, or from its JSON.

        Raises:
            ConfigFormatError: if it has other keys.
            ConfigError: if a value is out of range.
        """
        if sorted(document) != sorted(_FIELDS):
            raise ConfigFormatError(
                "a window table has other keys than it should",
                got=", ".join(map(str, document)),
                expected="windows, choice",
                next_step='write {"windows": [[3, 3, 3]], "choice": [[[0]]]}, for instance',
            )
        return WindowTable(windows=document["windows"], choice=document["choice"])


def as_tuples(value: Any) -> Any:
    """Return nested lists and tuples, as JSON has them, as tuples; anything else as it is."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _check_windows(windows: Any) -> None:
    valid = isinstance(windows, tuple) and windows and all(map(_is_window, windows))
    if not valid or len({len(window) for window in windows}) != 1:
        raise ConfigError(
            "WindowTable.windows is not a palette of windows",
            got=_shorten(repr(windows)),
            expected="windows of 1 to 3 positive integers, all with as many axes",
            next_step="pass windows=((3, 3, 3), (1, 5, 5)), for instance",
        )


def _is_window(window: Any) -> bool:
    return (
        isinstance(window, tuple)
        and 1 <= len(window) <= 3
        and all(
            isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in window
        )
    )


def _is_table(choice: Any, palette_size: int) -> bool:
    if not (isinstance(choice, tuple) and all(isinstance(layers, tuple) for layers in choice)):
        return False
    rows = [heads for layers in choice for heads in layers]
    if not rows or not all(isinstance(heads, tuple) and heads for heads in rows):
        return False
    full = len({len(layers) for layers in choice}) == len({len(heads) for heads in rows}) == 1
    return full and all(_is_index(i, palette_size) for heads in rows for i in heads)


def _is_index(value: Any, palette_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < palette_size


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
