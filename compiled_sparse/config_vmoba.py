"""The config of mixture-of-block attention for video."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import ClassVar

from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import is_count
from compiled_sparse.config import parse_json_object
from compiled_sparse.config import read_text
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import LayoutError

KINDS = ("temporal", "spatial", "st")
MODES = ("threshold", "topk")
GROUPS = ("query_head", "block", "head_global", "overall")

_PUBLISHED_FIRST_FULL_STEP = 12
_TOO_MANY = 1 << 31
_OF_A_CALL = ("current_timestep", "patch_resolution", "raw_latent_shape", "patch_size", "device")
"""What published documents may hold beside the config: it is the call's, and found there."""


@dataclass(frozen=True, kw_only=True)
class VMoBA(MechanismConfig):
    """Mixture-of-block attention: each query chooses the chunks of keys it attends to.

    The video is cut into chunks (arXiv 2506.23858). A query attends to all keys of its own chunk
    and of those whose mean key it likes best. From layer to layer the chunks take turns: runs of
    frames (temporal), columns through all frames (spatial), boxes (spatio-temporal, `st`). The
    softmax is exact over what is selected. Trainable; the selection passes no gradient on. Text is
    attended by every token and attends to every token. The fields are those of the published
    configs.

    Args:
        temporal_chunk_size: Frames of a temporal chunk; with a fraction, chunks are runs of as many
            tokens, rounded down.
        temporal_topk: Chunks a query attends to, its own included, in mode "topk". With 1 the
            published code selects nothing and then attends to everything, and so does this.
        spatial_chunk_size: Height and width of a spatial chunk in tokens.
        spatial_topk: As `temporal_topk`.
        st_chunk_size: Frames, height and width of a spatio-temporal chunk in tokens.
        st_topk: As `temporal_topk`.
        moba_select_mode: "topk": a fixed number of chunks. "threshold": so many that their share of
            the gate, scaled to 0..1, reaches `moba_threshold`.
        moba_threshold: That share; from about 1 on, all chunks.
        moba_threshold_type: What competes: "query_head", the chunks of each query and head alone;
            "block", the queries of all heads for each chunk (mode "threshold" only); "head_global",
            all pairs of query and chunk of a head, over the whole batch; "overall", those of all
            heads.
        first_full_layer: Layers in front of this one are dense, and turns are counted from it.
        first_full_step: Denoising steps before this one are dense; see `cs.metadata(step=)`. An
            unknown step counts as the first. Published configs say 12.
        temporal_layer: Layers of temporal chunks in a turn.
        spatial_layer: Layers of spatial chunks in a turn, after them.
        st_layer: Layers of spatio-temporal chunks in a turn, last.
        published_schedule: True does what the published code does with the two `first_full_*`: no
            layer and no step is dense, and layers in front of the first full one take their turns.

    Raises:
        ConfigError: if a value is out of range.
    """

    name: ClassVar[str] = "vmoba"

    temporal_chunk_size: float = 2
    temporal_topk: int = 3
    spatial_chunk_size: tuple[int, int] = (3, 4)
    spatial_topk: int = 20
    st_chunk_size: tuple[int, int, int] = (4, 6, 4)
    st_topk: int = 15
    moba_select_mode: str = "threshold"
    moba_threshold: float = 0.25
    moba_threshold_type: str = "query_head"
    first_full_layer: int = 0
    first_full_step: int = 0
    temporal_layer: int = 1
    spatial_layer: int = 1
    st_layer: int = 1
    published_schedule: bool = False

    def __post_init__(self) -> None:
        for name, sides in (("spatial_chunk_size", 2), ("st_chunk_size", 3)):
            given: Any = getattr(self, name)
            extents = tuple(given) if isinstance(given, list | tuple) else given
            object.__setattr__(self, name, extents)
            fits = isinstance(extents, tuple) and len(extents) == sides
            self._require(name, fits and all(map(is_count, extents)), f"{sides} sides in tokens")
        frames: Any = self.temporal_chunk_size
        self._require("temporal_chunk_size", _is_number(frames) and frames > 0, "frames, above 0")
        for name in ("temporal_topk", "spatial_topk", "st_topk"):
            topk = getattr(self, name)
            self._require(
                name, is_count(topk) and topk < _TOO_MANY, "an integer from 1 to 2^31 - 1"
            )
        for name in ("first_full_layer", "first_full_step", *_LAYERS):
            is_index = is_count(getattr(self, name), least=0)
            self._require(name, is_index, "an integer of at least 0")
        turn = sum(getattr(self, name) for name in _LAYERS)
        self._require("temporal_layer", turn > 0, "one layer in a turn, of whichever chunks")
        mode, groups = self.moba_select_mode, self.moba_threshold_type
        self._require("moba_select_mode", mode in MODES, _one_of(MODES))
        allowed = GROUPS if mode == "threshold" else tuple(g for g in GROUPS if g != "block")
        self._require(
            "moba_threshold_type", groups in allowed, f"{_one_of(allowed)} in mode {mode}"
        )
        threshold: Any = self.moba_threshold
        is_share = _is_number(threshold) and threshold >= 0
        self._require("moba_threshold", is_share, "a number of at least 0")
        self._require("published_schedule", isinstance(self.published_schedule, bool), "a bool")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(
                f"VMoBA.{name} is out of range",
                got=repr(getattr(self, name)),
                expected=expected,
                next_step="see docs/vmoba.md for what the fields mean",
            )

    @classmethod
    def from_published(cls, source: str | Path | Mapping[str, Any]) -> VMoBA:
        """Read a config of the published form: a JSON object of these fields.

        What it leaves out has the published default, `first_full_step` 12. What the published
        pipeline adds for a call, such as the latents' shape, is not read: it is the call's.

        Args:
            source: The path of the file, or what is in it.

        Raises:
            ConfigFormatError: if the file cannot be read, or holds a field that is not known.
            ConfigError: if a value is out of range.
        """
        if isinstance(source, Mapping):
            document: Mapping[str, Any] = source
        else:
            document = parse_json_object(read_text(Path(source), "config", "of a VMoBA config"))
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in document.items() if name not in _OF_A_CALL}
        if unknown := sorted(set(fields) - known):
            raise ConfigFormatError(
                "unknown field of a VMoBA config",
                got=", ".join(unknown),
                expected="fields among " + ", ".join(sorted(known)),
                next_step="correct or remove the field",
            )
        return cls(**{"first_full_step": _PUBLISHED_FIRST_FULL_STEP, **fields})

    def _described(self) -> list[str]:
        """Return the fields that are not at their default: there are many."""
        fields = dataclasses.fields(self)
        return [each.name for each in fields if getattr(self, each.name) != each.default]

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone."""
        return self.moba_threshold_type in ("query_head", "head_global")

    @property
    def num_axes(self) -> int:
        """Number of grid axes this config is written for."""
        return 3

    @property
    def needs_static_grid(self) -> bool:
        """Always: chunks that span frames or rows are as large as the grid says."""
        return True

    @property
    def needs_layer(self) -> bool:
        """Whether layers differ."""
        turns = sum(getattr(self, name) > 0 for name in _LAYERS)
        return turns > 1 or (self.first_full_layer > 0 and not self.published_schedule)

    @property
    def dense_first_steps(self) -> int:
        """Denoising steps at the start that stay dense."""
        return 0 if self.published_schedule else self.first_full_step

    def for_layer(self, layer: int) -> MechanismConfig:
        """Return what one layer does: `Dense`, or this config with its chunks alone."""
        if layer < self.first_full_layer and not self.published_schedule:
            return Dense()
        counts = [getattr(self, name) for name in _LAYERS]
        place = (layer - self.first_full_layer) % sum(counts)
        turn = 0 if place < counts[0] else 1 if place < counts[0] + counts[1] else 2
        fields: dict[str, Any] = {name: int(i == turn) for i, name in enumerate(_LAYERS)}
        for kind in KINDS[:turn] + KINDS[turn + 1 :]:
            # Layers of like chunks are alike, whatever the others' would be.
            for name in (f"{kind}_chunk_size", f"{kind}_topk"):
                fields[name] = getattr(type(self), name)
        return dataclasses.replace(self, first_full_layer=0, **fields)

    def at(self, step: int | None = None, layer: int | None = None) -> MechanismConfig:
        """Return what a layer does at a step; what is not known counts as the first."""
        return Dense() if (step or 0) < self.dense_first_steps else self.for_layer(layer or 0)

    @property
    def kind(self) -> str:
        """What chunks the first layer has, "temporal", "spatial" or "st"."""
        return next(k for k, name in zip(KINDS, _LAYERS, strict=True) if getattr(self, name))

    @property
    def topk(self) -> int:
        """Chunks a query of the first layer attends to in mode "topk"."""
        topk: int = getattr(self, f"{self.kind}_topk")
        return topk

    def resolve_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the grid that the chunks of the first layer are boxes of.

        Temporal chunks are runs of the video's tokens, which is then a grid of one axis.
        """
        return (math.prod(grid),) if self.kind == "temporal" else grid

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sides of a chunk of the first layer on `resolve_grid(grid)`.

        Raises:
            LayoutError: if the grid has not three axes, or a temporal chunk holds no token.
        """
        if len(grid) != self.num_axes:
            raise LayoutError(
                "VMoBA is written for the grid of a video",
                got=f"grid {grid}",
                expected="a grid of 3 axes (T, H, W)",
                next_step="pass grid_thw=(1, H, W) for an image",
            )
        if self.kind != "temporal":
            sides = self.st_chunk_size if self.kind == "st" else (grid[0], *self.spatial_chunk_size)
            return tuple(min(side, extent) for side, extent in zip(sides, grid, strict=True))
        tokens = int(min(self.temporal_chunk_size, grid[0]) * grid[1] * grid[2])
        if tokens < 1:
            raise LayoutError(
                "a temporal chunk holds no token",
                got=f"temporal_chunk_size={self.temporal_chunk_size} on grid {grid}",
                expected="at least one token: temporal_chunk_size * height * width",
                next_step="pass a larger temporal_chunk_size",
            )
        return (tokens,)


_LAYERS = tuple(f"{kind}_layer" for kind in KINDS)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    # Not `math.isfinite`, which a traced number is not given to.
    return is_real and value - value == 0  # type: ignore[operator]


def _one_of(values: tuple[str, ...]) -> str:
    return "one of " + ", ".join(map(repr, values))
