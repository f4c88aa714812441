"""Mechanism configs: frozen, keyword-only, checked when built, with a JSON round trip.

`Policy` and the forms a policy may be written in live in `compiled_sparse.policy`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import ClassVar
from typing import Literal
from typing import cast

from compiled_sparse import registry
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import UnknownMechanismError
from compiled_sparse.layout import auto_tile
from compiled_sparse.windows import Window
from compiled_sparse.windows import WindowTable
from compiled_sparse.windows import as_tuples

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)  # version 1 has no schedules and no numbers for Auto


@dataclass(frozen=True, kw_only=True)
class MechanismConfig:
    """Base of every mechanism's config.

    Subclasses are frozen dataclasses that set `name`; `compiled_sparse.registry` makes them known.
    With `has_sparsity` the config says how much of the work is left out, which the sparsity of
    `cs.metadata` replaces: in a field `sparsity`, or as `with_sparsity` does.
    """

    name: ClassVar[str] = ""
    has_sparsity: ClassVar[bool] = False

    @property
    def grid_is_sequence(self) -> bool:
        """Whether it is given the whole sequence, text included, as a grid of one axis.

        No other grid need be known then.
        """
        return False

    @property
    def num_axes(self) -> int | None:
        """Number of grid axes this config is written for; None if any will do."""
        return None

    @property
    def needs_static_grid(self) -> bool:
        """Whether something is chosen by the grid, so that each grid compiles anew."""
        return False

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sides of a tile on `grid`; the automatic choice unless a class knows better.

        Raises:
            LayoutError: if the grid does not fit the config.
        """
        return auto_tile(grid)

    def resolve_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the grid that `resolve_tile` cuts: the same, or one of fewer axes."""
        return grid

    def resolved(self, tile: tuple[int, ...]) -> MechanismConfig:
        """Return the config with its automatic parts filled in, as reports show it."""
        return self

    @property
    def table(self) -> WindowTable | None:
        """The table of windows by step and layer, if there is one."""
        return None

    @property
    def gate_name(self) -> str | None:
        """The learned gate this config needs in every attention module, by the module's name."""
        return None

    @property
    def projection_name(self) -> str | None:
        """The learned projection this config uses in every attention module, by its name there."""
        return None

    def with_sparsity(self, sparsity: float) -> MechanismConfig:
        """Return the config with another sparsity, for one that `has_sparsity`.

        Raises:
            ConfigError: if the sparsity is out of range.
        """
        return dataclasses.replace(self, sparsity=sparsity)  # type: ignore[call-arg]

    def at(self, step: int | None = None, layer: int | None = None) -> MechanismConfig:
        """Return the config at a step in a layer; the same one unless it holds a schedule."""
        return self

    @property
    def needs_layer(self) -> bool:
        """Whether layers differ, so that the index of a call's layer has to be known."""
        return False

    def for_layer(self, layer: int) -> MechanismConfig:
        """Return what one layer does, `Dense` where it is left alone; layers count from 0."""
        return self

    @property
    def dense_first_steps(self) -> int:
        """Denoising steps at the start that stay dense."""
        return 0

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone.

        Only then may the heads of one call be divided among processes.
        """
        return False

    def for_heads(self, first: int, last: int) -> MechanismConfig:
        """Return what some of the query heads do.

        Args:
            first: First head.
            last: The one behind the last.
        """
        return self

    def check_heads(self, heads: int) -> None:
        """Check that the config fits a number of query heads.

        Raises:
            ConfigError: if it does not.
        """

    @property
    def takes_gate(self) -> bool:
        """Whether a gate that is there is made use of."""
        return False

    def check_gate(self, gate: bool) -> None:
        """Check that the config makes use of a gate if one is given.

        Args:
            gate: Whether there is one.

        Raises:
            ConfigError: if it does not, or lacks one it needs.
        """
        if gate:
            raise ConfigError(
                f"{self.name or type(self).__name__} takes no gate",
                got="a gate tensor",
                expected="gate=None",
                next_step="leave the gate out, or name a mechanism that has one, such as VSA()",
            )

    def check_projection(self, projection: object) -> None:
        """Check that the config makes use of a projection if one is given.

        Args:
            projection: What was given, None for nothing.

        Raises:
            ConfigError: if it does not, or it is no weight and bias.
        """
        if projection is not None:
            raise ConfigError(
                f"{self.name or type(self).__name__} takes no projection",
                got="a projection",
                expected="proj=None",
                next_step="leave proj out, or name a mechanism with a linear branch, such as SLA()",
            )

    def check_sparsity(self, sparsity: object) -> None:
        """Check that a sparsity given for a call can replace one of the config's.

        Raises:
            ConfigError: if the config has none.
        """
        if sparsity is not None and not self.has_sparsity:
            raise ConfigError(
                f"{self.name or type(self).__name__} has no sparsity that could be replaced",
                got=f"sparsity={sparsity!r}",
                expected="sparsity=None",
                next_step="choose the work to leave out in the config, by its window for instance",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values, with `version` and `mechanism`."""
        return {"version": FORMAT_VERSION, "mechanism": self.name, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the config as a JSON document."""
        return json.dumps(self.to_dict())

    def describe(self) -> str:
        """Return the config as a spec string, e.g. `sta:window_thw=3x3x3,tile_thw=6x8x8`."""
        fields = [f"{name}={_spec_value(getattr(self, name))}" for name in self._described()]
        return self.name + (":" + ",".join(fields) if fields else "")

    def _described(self) -> list[str]:
        """Return the fields that a spec string shows; the others must be at their default."""
        return [field.name for field in dataclasses.fields(self)]

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> MechanismConfig:
        """Build a config from what `to_dict` returned.

        Raises:
            ConfigFormatError: if the document has another version or unknown fields.
            UnknownMechanismError: if the mechanism is not known.
            ConfigError: if a value is out of range.
        """
        check_version(document)
        fields = {k: v for k, v in document.items() if k not in ("version", "mechanism")}
        return build_config(str(document.get("mechanism")), fields)

    @staticmethod
    def from_json(text: str) -> MechanismConfig:
        """Build a config from what `to_json` returned; raises as `from_dict` does."""
        return MechanismConfig.from_dict(parse_json_object(text))


@dataclass(frozen=True, kw_only=True)
class Auto(MechanismConfig):
    """Let the selector choose: training-free STA where a gain is predicted, dense elsewhere.

    Args:
        window_fraction: Share of each axis that the window covers, above 0 and at most 1; the
            smaller, the faster and the further from dense attention.
        min_tokens: Sequences of fewer tokens stay dense.
        min_gain: A predicted speed-up below this one leaves the call dense.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "auto"

    window_fraction: float = 0.6
    min_tokens: int = 2048
    min_gain: float = 1.3

    def __post_init__(self) -> None:
        values = (self.window_fraction, self.min_tokens, self.min_gain)
        in_range = (
            all(isinstance(each, int | float) for each in values)
            and 0.0 < self.window_fraction <= 1.0
            and self.min_tokens >= 0
            and self.min_gain >= 0.0
        )
        if not in_range:
            raise ConfigError(
                "Auto has a number out of range",
                got=f"window_fraction={self.window_fraction!r}, min_tokens={self.min_tokens!r}, "
                f"min_gain={self.min_gain!r}",
                expected="0 < window_fraction <= 1, min_tokens >= 0, min_gain >= 0",
                next_step="pass window_fraction=0.6, for instance",
            )

    @property
    def needs_static_grid(self) -> bool:
        """Always: window and tile are chosen by the grid."""
        return True


@dataclass(frozen=True, kw_only=True)
class Dense(MechanismConfig):
    """Ordinary full attention: the call is left as it is."""

    name: ClassVar[str] = "dense"

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone."""
        return True


@dataclass(frozen=True, kw_only=True)
class STA(MechanismConfig):
    """Sliding tile attention: each tile attends to a window of whole tiles (arXiv 2502.04507).

    A window of k tiles on an axis of N tiles covers `2 * (k // 2) + 1` tiles, so an even k acts as
    k + 1; it is shifted inwards at the borders and never wider than the axis. Video tokens also
    attend to all text tokens, and text tokens attend to everything. Training-free, and trainable.

    Args:
        window_thw: Window in tiles per axis, (T, H, W) for video, (H, W) for images; or one such
            triple per query head; or a `WindowTable` of windows by step, layer and head. On one
            axis a plain integer will do, as for `tile_thw`.
        tile_thw: Tokens per axis of a tile, or "auto" for the compact tile with least padding on
            the grid at hand. Grids need not be divisible by it.

    Raises:
        ConfigError: if a window or tile is not made of positive integers, or their numbers of axes
            differ.
    """

    name: ClassVar[str] = "sta"

    window_thw: Window | tuple[Window, ...] | WindowTable = (3, 3, 3)
    tile_thw: tuple[int, ...] | Literal["auto"] = (6, 8, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "window_thw", _as_windows(self.window_thw))
        object.__setattr__(self, "tile_thw", as_extents(self.tile_thw))
        windows = self.windows
        require_extents("STA.window_thw", windows, self.window_thw)
        if len({len(window) for window in windows}) != 1:
            raise ConfigError(
                "STA.window_thw has windows of different lengths",
                got=repr(self.window_thw),
                expected="the same number of axes for every head",
                next_step="pass one (T, H, W) triple, or one triple per query head",
            )
        if self.tile_thw == "auto":
            return
        require_extents("STA.tile_thw", (self.tile_thw,), self.tile_thw)
        if len(self.tile_thw) != self.num_axes:
            raise ConfigError(
                "STA.window_thw and STA.tile_thw have different numbers of axes",
                got=f"window_thw={self.window_thw}, tile_thw={self.tile_thw}",
                expected="one tile side per window axis",
                next_step='pass a tile with as many sides as the window, or tile_thw="auto"',
            )

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows: one for all heads, or one per query head; of a table, its palette."""
        if isinstance(self.window_thw, WindowTable):
            return self.window_thw.windows
        given: Any = self.window_thw
        per_head = isinstance(given, tuple) and given and isinstance(given[0], tuple)
        return cast("tuple[Window, ...]", given if per_head else (given,))

    @property
    def table(self) -> WindowTable | None:
        """The table of windows by step and layer, if there is one."""
        return self.window_thw if isinstance(self.window_thw, WindowTable) else None

    @property
    def num_heads(self) -> int:
        """Number of query heads the windows are for; 1 holds for any."""
        return len(self.windows) if self.table is None else self.table.num_heads

    def at(self, step: int | None = None, layer: int | None = None) -> STA:
        """Return the config at a step in a layer, with plain windows."""
        if self.table is None:
            return self
        return dataclasses.replace(self, window_thw=self.table.row(step or 0, layer or 0))

    @property
    def num_axes(self) -> int:
        """Number of grid axes this config is written for."""
        return len(self.windows[0])

    @property
    def needs_static_grid(self) -> bool:
        """Whether the tile is chosen by the grid."""
        return self.tile_thw == "auto"

    def resolved(self, tile: tuple[int, ...]) -> STA:
        """Return the config with the tile it has on a grid."""
        return dataclasses.replace(self, tile_thw=tile)

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tile used on `grid`: `tile_thw`, or the automatic choice.

        Raises:
            LayoutError: if the grid has another number of axes than the config.
        """
        if len(grid) != self.num_axes:
            raise LayoutError(
                "the grid and the config have different numbers of axes",
                got=f"grid {grid}, window_thw={self.window_thw}",
                expected=f"a grid of {self.num_axes} axes",
                next_step=f"pass a window and a tile with {len(grid)} sides",
            )
        return auto_tile(grid) if self.tile_thw == "auto" else self.tile_thw

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone."""
        return True

    def for_heads(self, first: int, last: int) -> STA:
        """Return the windows of some of the query heads.

        Args:
            first: First head.
            last: The one behind the last.
        """
        if self.num_heads == 1:
            return self
        windows = self.windows[first:last] if self.table is None else self.table.heads(first, last)
        return dataclasses.replace(self, window_thw=windows)

    def check_heads(self, heads: int) -> None:
        """Check that there is one window for all query heads, or one for each.

        Raises:
            ConfigError: if there is not.
        """
        if self.num_heads not in (1, heads):
            raise ConfigError(
                "STA.window_thw does not have one window per query head",
                got=f"{self.num_heads} windows for {heads} heads",
                expected=f"1 or {heads} windows",
                next_step="pass one window for all heads, or one per query head",
            )


@dataclass(frozen=True, kw_only=True)
class SWBA(MechanismConfig):
    """Sliding-window block attention: causal from block to block, bidirectional inside a block.

    The whole sequence, text included, is cut in order into blocks of `block` tokens. Query block i
    attends to the key blocks j with `i - window < j <= i`. A token never attends to later blocks:
    for models that generate in temporal order.

    Args:
        block: Tokens of a block; the last block of a sequence may be shorter.
        window: Blocks a query sees, its own included.

    Raises:
        ConfigError: if a value is not a positive integer.
    """

    name: ClassVar[str] = "swba"

    block: int = 256
    window: int = 4

    def __post_init__(self) -> None:
        if not (is_count(self.block) and is_count(self.window)):
            raise ConfigError(
                "SWBA has a value that is not a positive integer",
                got=f"block={self.block!r}, window={self.window!r}",
                expected="block in tokens and window in blocks, integers of at least 1",
                next_step="pass block=256, window=4, for instance",
            )

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone."""
        return True

    @property
    def grid_is_sequence(self) -> bool:
        """Always: blocks are runs of the sequence."""
        return True

    @property
    def num_axes(self) -> int:
        """Number of grid axes this config is written for: the sequence is one."""
        return 1

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tile used on any sequence: a block."""
        return (self.block,)


def at_sparsity(config: MechanismConfig, sparsity: float | None) -> MechanismConfig:
    """Return a config with its sparsity replaced, if it has one and another is given.

    Raises:
        ConfigError: if the sparsity is out of range.
    """
    if sparsity is None or not config.has_sparsity:
        return config
    return config.with_sparsity(sparsity)


_WITHOUT_OP: dict[str, type[MechanismConfig]] = {"auto": Auto, "dense": Dense}


def _config_class(name: str) -> type[MechanismConfig] | None:
    mechanism = None if name in _WITHOUT_OP else registry.find(name)
    return _WITHOUT_OP.get(name) if mechanism is None else mechanism.config


def known_mechanisms() -> tuple[str, ...]:
    """Return the names of all registered mechanisms, sorted."""
    return tuple(sorted((*_WITHOUT_OP, *(each.name for each in registry.mechanisms()))))


def build_config(name: str, fields: Mapping[str, Any]) -> MechanismConfig:
    """Build the config of mechanism `name` from its fields.

    Raises:
        UnknownMechanismError: if no mechanism has this name.
        ConfigFormatError: if a field is not one of the mechanism's.
        ConfigError: if a value is out of range.
    """
    config_class = _config_class(name.lower())
    if config_class is None:
        raise UnknownMechanismError(
            "unknown mechanism",
            got=repr(name),
            expected="one of " + ", ".join(known_mechanisms()),
            next_step="correct the name, or pass a config object such as STA(...)",
        )
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigFormatError(
            f"unknown field of mechanism {config_class.name!r}",
            got=", ".join(unknown),
            expected="fields among " + (", ".join(sorted(known)) or "(none)"),
            next_step="correct the field name, or upgrade if the file comes from a newer version",
        )
    return config_class(**fields)


def parse_spec(spec: str) -> MechanismConfig:
    """Build a config from a spec string.

    Args:
        spec: `name` or `name:key=value,key=value`; tuples are written `3x3x3`, one tuple per head
            `3x3x3/1x5x5`.

    Returns:
        The config.

    Raises:
        UnknownMechanismError: if the name is not known.
        ConfigFormatError: if a part is not `key=value`, or a key is unknown.
        ConfigError: if a value is out of range.
    """
    name, _, rest = spec.strip().partition(":")
    fields: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigFormatError(
                "part of a spec string is not key=value",
                got=repr(part),
                expected="name:key=value,key=value",
                next_step="write it like sta:window_thw=3x3x3,tile_thw=6x8x8",
            )
        fields[key.strip()] = _parse_spec_value(value.strip())
    return build_config(name.strip(), fields)


def check_version(document: Mapping[str, Any]) -> None:
    """Check the `version` of a JSON document.

    Raises:
        ConfigFormatError: if it is missing or not one this release can read.
    """
    if document.get("version") not in _READABLE_VERSIONS:
        raise ConfigFormatError(
            "JSON document of another format version",
            got=f"version {document.get('version')!r}",
            expected="version " + " or ".join(map(str, _READABLE_VERSIONS)),
            next_step="write the file again with to_json(), or use the release that wrote it",
        )


def parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON document that must be an object.

    Raises:
        ConfigFormatError: if it is not JSON, or not an object.
    """
    try:
        document = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ConfigFormatError(
            "not a JSON document",
            got=f"{repr(text)[:40]}: {error}",
            expected="a JSON object",
            next_step="check the file, or write it again with to_json()",
        ) from None
    if not isinstance(document, dict):
        raise ConfigFormatError(
            "JSON document is not an object",
            got=type(document).__name__,
            expected='an object with "version"',
            next_step="write the file again with to_json()",
        )
    return document


def read_text(path: Path, what: str, kind: str) -> str:
    """Return what is in a file.

    Args:
        path: Its path.
        what: What it is called in an error, such as "policy".
        kind: What JSON file it should be, such as "written by Policy.to_json()".

    Raises:
        ConfigFormatError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFormatError(
            f"{what} file cannot be read",
            got=f"{path}: {getattr(error, 'strerror', error)}",
            expected=f"a readable JSON file {kind}",
            next_step="check the path",
        ) from None


def _as_windows(value: Any) -> Any:
    if isinstance(value, Mapping):
        return WindowTable.from_dict(value)
    return as_extents(value)


def as_extents(value: Any) -> Any:
    """Return sides of a box, given as an integer, list or tuple, as a tuple; checks nothing."""
    return (value,) if isinstance(value, int) else as_tuples(value)


def require_extents(name: str, values: tuple[Any, ...], shown: object) -> None:
    """Check that each of `values` is a tuple of one to three positive integers.

    Raises:
        ConfigError: naming the field `name` and what was given, `shown`, if one is not.
    """

    def valid(extents: Any) -> bool:
        return isinstance(extents, tuple) and 1 <= len(extents) <= 3 and all(map(is_count, extents))

    if not all(valid(extents) for extents in values):
        raise ConfigError(
            f"{name} is not made of positive integers",
            got=repr(shown),
            expected="1 to 3 positive integers, slowest axis first",
            next_step=f"pass {name.split('.')[1]}=(3, 3, 3), for instance",
        )


def is_count(value: object, least: int = 1) -> bool:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _spec_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ("/" if value and isinstance(value[0], tuple) else "x").join(map(_spec_value, value))
    return value.describe() if isinstance(value, WindowTable) else str(value)


def _parse_spec_value(text: str) -> Any:
    if "/" in text:
        parts = [_parse_spec_value(part) for part in text.split("/")]
        return tuple(part if isinstance(part, tuple) else (part,) for part in parts)
    sides = text.split("x")
    if len(sides) > 1 and all(side.isdigit() for side in sides):
        return tuple(int(side) for side in sides)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
