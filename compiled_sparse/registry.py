"""The mechanisms there are: one record for each, the built-in ones like the foreign ones.

    register(Mechanism(config=MyConfig, evaluate=..., lower=..., token_mask=...))

A package that is merely installed is found through the entry-point group
`compiled_sparse.mechanisms`: an entry is called like the mechanism and leads to a `Mechanism`. It
is loaded when its name is looked up, or when all names are asked for. See docs/extending.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import fields
from importlib import metadata
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import UnknownMechanismError
from compiled_sparse.layout import BlockLayout

if TYPE_CHECKING:
    from compiled_sparse.config import Auto
    from compiled_sparse.config import MechanismConfig

logger = logging.getLogger("compiled_sparse")

ENTRY_POINT_GROUP = "compiled_sparse.mechanisms"

KERNEL_EFFICIENCY = 0.8
"""Share of the ideal speed-up (1 / density) the kernel reaches; see benchmarks/README.md."""

RUNTIME_INPUTS = ("step", "sparsity", "layer", "windows")
"""Tensors an op may ask for; each is always there."""

OPTIONAL_INPUTS = ("given_sparsity", "gate", "proj_weight", "proj_bias")
"""Those an op is given as a tensor or as None: the sparsity of `cs.metadata`, what a module has."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the tensors of a call may be.

    Args:
        dtypes: Accepted dtypes of queries, keys and values.
        max_head_dim: Largest head size.
        head_dims: The only head sizes; None means all up to the largest.
        gpu_dtypes: Accepted dtypes on GPUs; None means the same.
        gpu_max_head_dim: Largest head size on GPUs; None means the same.
        devices: Accepted device types.
        num_axes: Accepted numbers of grid axes.
        forward_only: Whether there is no backward.
        causal: Whether the mechanism is causal itself; only such a one takes causal calls.
        key_mask: Whether a key-padding mask is accepted.
    """

    dtypes: frozenset[torch.dtype]
    max_head_dim: int
    head_dims: frozenset[int] | None = None
    gpu_dtypes: frozenset[torch.dtype] | None = None
    gpu_max_head_dim: int | None = None
    devices: frozenset[str] = frozenset({"cpu"})
    num_axes: frozenset[int] = frozenset({1, 2, 3})
    forward_only: bool = False
    causal: bool = False
    key_mask: bool = True

    def takes_head_dim(self, head_dim: object) -> bool:
        """Whether a head size is accepted; a symbol nobody can decide on is not."""
        if not isinstance(head_dim, int) or head_dim > self.max_head_dim:
            return False
        return self.head_dims is None or head_dim in self.head_dims

    def on_device(self, device: str) -> Capabilities:
        """Return what holds on a device type."""
        if device == "cpu":
            return self
        dtypes = self.dtypes if self.gpu_dtypes is None else self.gpu_dtypes
        limit = self.max_head_dim if self.gpu_max_head_dim is None else self.gpu_max_head_dim
        return dataclasses.replace(self, dtypes=dtypes, max_head_dim=limit)


@dataclass(frozen=True)
class Refused:
    """The site stays dense.

    Args:
        reason: Code from `compiled_sparse.reasons`.
        detail: What was seen.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Chosen:
    """The site takes `config`.

    Args:
        config: The mechanism, with nothing left automatic but the tile.
        tile: Tile sides on this grid.
        density: Fraction of token pairs attended.
        predicted_gain: Predicted speed-up over dense attention.
        detail: What a report should add, such as the range of a density that varies.
    """

    config: MechanismConfig
    tile: tuple[int, ...]
    density: float
    predicted_gain: float
    detail: str = ""


class OpCall(NamedTuple):
    """One call of a mechanism's op: `op(q, k, v, key_mask, *arguments, *runtime, scale)`.

    Attributes:
        op: The op, returning the output and the log-sum-exp.
        arguments: Its static arguments; sizes may be symbolic, or graph nodes.
        runtime_inputs: Names among `RUNTIME_INPUTS` and `OPTIONAL_INPUTS` of the tensors that
            follow them.
    """

    op: Any
    arguments: tuple[Any, ...]
    runtime_inputs: tuple[str, ...] = ()


Evaluate = Callable[[Any, BlockLayout, int], "Chosen | Refused"]
Lower = Callable[..., OpCall]
TokenMask = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Everything the rest of the package knows about a mechanism.

    Args:
        config: Its config class, whose `name` is the mechanism's.
        capabilities: What the tensors of a call may be.
        evaluate: From config, block layout and number of query heads to the choice with its
            counted density, or the refusal.
        lower: From config, tile, grid, text before and text after to the op's call; sizes may be
            symbolic.
        token_mask: The definition, where it is a fixed mask: from config, query and key positions
            counted from the first video token, grid and tile to bool [1 or heads, queries, keys].
        reference: The definition, where it is more than a mask: called as
            `compiled_sparse.reference.attention` is, returns the output and the log-sum-exp.
        automatic: What `Auto` chooses on a layout; None for a mechanism `Auto` never takes.

    Raises:
        ConfigError: if there is no name, or not exactly one of `token_mask` and `reference`, or a
            field of the config has no default, so that its name alone would name no mechanism.
    """

    config: type[MechanismConfig]
    capabilities: Capabilities
    evaluate: Evaluate
    lower: Lower
    token_mask: TokenMask | None = None
    reference: Callable[..., tuple[Tensor, Tensor]] | None = None
    automatic: Callable[[Auto, BlockLayout], MechanismConfig] | None = None

    def __post_init__(self) -> None:
        if not self.name or (self.token_mask is None) == (self.reference is None):
            raise ConfigError(
                "mechanism without a name or without one definition",
                got=f"name {self.name!r}, token_mask={self.token_mask}, reference={self.reference}",
                expected="a config class with a name, and one of token_mask and reference",
                next_step="set `name` on the config class and pass the mechanism's reference",
            )
        required = [
            each.name
            for each in fields(self.config)
            if each.default is MISSING and each.default_factory is MISSING
        ]
        if required:
            raise ConfigError(
                "a config has fields without a default",
                got=f"{self.config.__qualname__}: {', '.join(required)}",
                expected="a default for each, as the mechanism's name alone is a policy too",
                next_step="give every field of the config class a default",
            )

    @property
    def name(self) -> str:
        """The mechanism's name in spec strings, JSON and reports."""
        return self.config.name


_mechanisms: dict[str, Mechanism] = {}
_RESERVED = ("auto", "dense")


def register(mechanism: Mechanism) -> Mechanism:
    """Make a mechanism known by its config's name; registering it again changes nothing.

    Raises:
        ConfigError: if another mechanism has the name, or it is no mechanism.
    """
    if not isinstance(mechanism, Mechanism):
        raise ConfigError(
            "this is no mechanism",
            got=repr(mechanism),
            expected="a compiled_sparse.registry.Mechanism",
            next_step="make one with block_selector_mechanism(...), for instance",
        )
    known = _mechanisms.get(mechanism.name, mechanism)
    if known.config is not mechanism.config or mechanism.name in _RESERVED:
        raise ConfigError(
            "two mechanisms of one name",
            got=f"{mechanism.name!r} for {mechanism.config.__qualname__}",
            expected="a name that no other mechanism has",
            next_step="change `name` on the config class",
        )
    _mechanisms[mechanism.name] = mechanism
    return mechanism


def find(name: str) -> Mechanism | None:
    """Return the mechanism of a name, from an installed package if need be, or None.

    Raises:
        UnknownMechanismError: if an installed package offers the name but cannot be loaded.
    """
    if name not in _mechanisms:
        for entry in metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
            register(_load(entry))
    return _mechanisms.get(name)


def mechanism_of(config: MechanismConfig) -> Mechanism | None:
    """Return the mechanism of a config; None for `Dense`, `Auto` and unregistered classes."""
    # A plain look-up: this runs inside traced code.
    mechanism = _mechanisms.get(config.name)
    return mechanism if mechanism is not None and type(config) is mechanism.config else None


def mechanisms() -> tuple[Mechanism, ...]:
    """Return all mechanisms by name; one of an installed package that cannot load is logged."""
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name not in _mechanisms:
            try:
                register(_load(entry))
            except UnknownMechanismError as error:
                logger.warning("%s", error)
    return tuple(_mechanisms[name] for name in sorted(_mechanisms))


def automatic() -> Mechanism:
    """Return the mechanism `Auto` takes: the first registered that offers itself."""
    return next(each for each in _mechanisms.values() if each.automatic is not None)


def _load(entry: metadata.EntryPoint) -> Mechanism:
    try:
        loaded: Any = entry.load()
    except (ImportError, AttributeError) as error:
        loaded = error
    if isinstance(loaded, Mechanism) and loaded.name == entry.name:
        return loaded
    raise UnknownMechanismError(
        f"the entry point {entry.name!r} gives no mechanism of this name",
        got=f"{entry.value}: {loaded!r}",
        expected="module:NAME of a compiled_sparse.registry.Mechanism called like the entry point",
        next_step="correct the entry point, or uninstall the package it comes from",
    )
