"""The configs of sparse-linear attention, in full precision and quantised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from typing import ClassVar

from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import as_extents
from compiled_sparse.config import require_extents
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError
from compiled_sparse.sparsity import ratio_at

FEATURE_MAPS = ("softmax", "elu", "relu")
VALUES = ("auto", "float8", "float16")
Block = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SLA(MechanismConfig):
    """Sparse-linear attention: exact for the best key blocks, linear for all keys.

    Two branches (arXiv 2509.24006). The sparse one: each query block attends to the share of the
    key blocks whose mean key its mean query likes best. The linear one: attention through a feature
    map over all keys, in time and memory linear in the length, sent through a learned projection
    and added. The projection is zero at first, and without one there is no linear branch.
    Trainable; the selection itself passes no gradient on.

    Blocks are runs of the whole sequence, text included, as published, or boxes of the video grid;
    then text is attended by every token and attends to every token.

    Args:
        topk_ratio: Share of the key blocks that is kept, above 0 and at most 1; the number is cut
            off, and at least 1. The sparsity of `cs.metadata` replaces it by 1 - sparsity.
        feature_map: "softmax" (over the channels), "elu" (elu + 1) or "relu".
        block_q: Tokens of a query block; or its sides on the video grid, such as (4, 8, 4).
        block_k: The same for a key block, with as many sides.
        proj: Name of the learned projection of an attention module, which `cs.attach` adds. None:
            the sparse branch alone.

    Raises:
        ConfigError: if a value is out of range, or the blocks differ in their number of axes.
    """

    name: ClassVar[str] = "sla"
    has_sparsity: ClassVar[bool] = True

    topk_ratio: float = 0.1
    feature_map: str = "softmax"
    block_q: Block = 128
    block_k: Block = 64
    proj: str | None = "proj_l"

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            extents = as_extents(getattr(self, name))
            require_extents(f"{type(self).__name__}.{name}", (extents,), getattr(self, name))
            object.__setattr__(self, name, extents if len(extents) > 1 else extents[0])
        self._check_numbers()
        if len(self.query_tile) != len(self.key_tile):
            raise ConfigError(
                "the blocks of queries and keys have different numbers of axes",
                got=f"block_q={self.block_q}, block_k={self.block_k}",
                expected="two runs of tokens, or two boxes with as many sides",
                next_step="pass block_q=(4, 8, 4), block_k=(4, 4, 4), for instance",
            )

    def _check_numbers(self) -> None:
        name = type(self).__name__
        ratio: Any = self.topk_ratio
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not is_number or not 0 < ratio <= 1:
            raise ConfigError(
                f"{name}.topk_ratio is out of range",
                got=repr(ratio),
                expected="a number in (0, 1]: the share of key blocks to keep",
                next_step="pass topk_ratio=0.1, for instance",
            )
        if self.feature_map not in FEATURE_MAPS:
            raise ConfigError(
                f"{name}.feature_map is not known",
                got=repr(self.feature_map),
                expected="one of " + ", ".join(map(repr, FEATURE_MAPS)),
                next_step='pass feature_map="softmax", as published checkpoints are trained',
            )
        proj: Any = self.proj
        if proj is not None and not (isinstance(proj, str) and proj.isidentifier()):
            raise ConfigError(
                f"{name}.proj is no name of a module",
                got=repr(proj),
                expected="None, or the name of a learned projection",
                next_step='pass proj="proj_l"; tensors go to cs.attention(proj=(weight, bias))',
            )

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone."""
        return True

    @property
    def query_tile(self) -> tuple[int, ...]:
        """Sides of a query block."""
        return self.block_q if isinstance(self.block_q, tuple) else (self.block_q,)

    @property
    def key_tile(self) -> tuple[int, ...]:
        """Sides of a key block."""
        return self.block_k if isinstance(self.block_k, tuple) else (self.block_k,)

    @property
    def grid_is_sequence(self) -> bool:
        """Whether blocks are runs of the sequence."""
        return self.num_axes == 1

    @property
    def num_axes(self) -> int:
        """Number of grid axes this config is written for; the sequence is one."""
        return len(self.query_tile)

    @property
    def projection_name(self) -> str | None:
        """The learned projection, if one is used."""
        return self.proj

    def with_sparsity(self, sparsity: float) -> MechanismConfig:
        """Return the config that keeps the share 1 - sparsity.

        Raises:
            ConfigError: if the sparsity is out of range.
        """
        if not 0 <= sparsity < 1:
            raise ConfigError(
                f"a sparsity for {type(self).__name__} is out of range",
                got=f"sparsity={sparsity!r}",
                expected="a number in [0, 1): the fraction of key blocks to leave out",
                next_step="pass sparsity=0.9, for instance, which keeps a tenth",
            )
        return dataclasses.replace(self, topk_ratio=ratio_at(sparsity))

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sides of a query block.

        Raises:
            LayoutError: if the grid has another number of axes than the blocks.
        """
        if len(grid) != self.num_axes:
            raise LayoutError(
                "the grid and the blocks have different numbers of axes",
                got=f"grid {grid}, block_q={self.block_q}, block_k={self.block_k}",
                expected=f"a grid of {self.num_axes} axes",
                next_step=f"pass blocks with {len(grid)} sides, or with one for runs of tokens",
            )
        return self.query_tile

    def check_projection(self, projection: object) -> None:
        """Check that a projection is weight and bias, and that it is made use of.

        Raises:
            ConfigError: if it is not.
        """
        if projection is None:
            return
        if self.proj is None:
            raise ConfigError(
                "a projection is given to a config without a linear branch",
                got=f"proj= and {type(self).__name__}(proj=None)",
                expected="one of the two",
                next_step=f"leave proj= out, or use {type(self).__name__}()",
            )
        if not isinstance(projection, tuple | list) or len(projection) != 2:
            raise ConfigError(
                "proj is no pair of weight and bias",
                got=type(projection).__name__,
                expected="(weight [head_dim, head_dim], bias [head_dim] or None)",
                next_step="pass proj=(linear.weight, linear.bias) of the learned projection",
            )


@dataclass(frozen=True, kw_only=True)
class SageSLA(SLA):
    """Sparse-linear attention whose sparse branch is quantised; inference only.

    Queries and keys are int8 by block, keys after their mean is taken off; values and probabilities
    are 8-bit floats, or half precision. The linear branch is that of `SLA`, unquantised. Head size
    64 or 128.

    Published code takes blocks of 128 queries by 64 keys, on Hopper GPUs 64 by 128: set them to
    compare with it there. Here they are the same everywhere.

    Args:
        topk_ratio: As for `SLA`.
        feature_map: As for `SLA`.
        block_q: As for `SLA`.
        block_k: As for `SLA`.
        proj: As for `SLA`.
        values: "float8" (e4m3), "float16", or "auto": float8, but float16 on GPUs that have no
            8-bit floats (older than compute capability 8.9).

    Raises:
        ConfigError: as `SLA` does, or if `values` is not known.
    """

    name: ClassVar[str] = "sage_sla"

    topk_ratio: float = 0.5
    values: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values not in VALUES:
            raise ConfigError(
                "SageSLA.values is not known",
                got=repr(self.values),
                expected="one of " + ", ".join(map(repr, VALUES)),
                next_step='pass values="auto"',
            )
