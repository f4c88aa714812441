"""The config of video sparse attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import as_extents
from compiled_sparse.config import require_extents
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError

UNGATED = "ungated"


@dataclass(frozen=True, kw_only=True)
class VSA(MechanismConfig):
    """Video sparse attention: each tile attends to the tiles its mean query likes best.

    Two branches (arXiv 2505.13389). The sparse one: of N tiles a query tile keeps the
    `ceil((1 - sparsity) * N)` whose mean keys score highest, and its tokens attend to the tokens of
    these. The compressed one: attention among the tiles' means, the same for all tokens of a tile,
    times a gate, added to the former. Trainable; the selection itself passes no gradient on. Text
    is attended by every token and attends to every token, and has no part in the compressed branch.

    Args:
        sparsity: Fraction of the tiles that is left out, at least 0 and below 1; the sparsity of
            `cs.metadata` replaces it for a call. With a compressed branch 0 is not dense attention.
        tile_thw: Tokens per axis of a tile; published models are trained with (4, 4, 4). Grids need
            not be divisible by it.
        gate: Whether there is a compressed branch, and what weighs it. None: a gate tensor if one
            is given or the attached module has one, else the sparse branch alone. A name, such as
            "to_gate_compress": the learned gate of that name, which `cs.attach` adds to each
            attention module and without which a call is refused. "ungated": the compressed branch
            as it is, which the published code does where its gate is None.

    Raises:
        ConfigError: if the sparsity is out of range, the tile is not made of positive integers, or
            the gate is no name.
    """

    name: ClassVar[str] = "vsa"
    has_sparsity: ClassVar[bool] = True

    sparsity: float = 0.9
    tile_thw: tuple[int, ...] = (4, 4, 4)
    gate: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile_thw", as_extents(self.tile_thw))
        require_extents("VSA.tile_thw", (self.tile_thw,), self.tile_thw)
        _require_sparsity(self.sparsity)
        _require_gate(self.gate)

    @property
    def has_separate_heads(self) -> bool:
        """Whether what a head attends to depends on that head alone."""
        return True

    @property
    def num_axes(self) -> int:
        """Number of grid axes this config is written for."""
        return len(self.tile_thw)

    @property
    def gate_name(self) -> str | None:
        """The learned gate, if the config names one."""
        return None if self.gate == UNGATED else self.gate

    @property
    def takes_gate(self) -> bool:
        """Whether a gate that is there is made use of."""
        return self.gate != UNGATED

    def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tile.

        Raises:
            LayoutError: if the grid has another number of axes than the tile.
        """
        if len(grid) != self.num_axes:
            raise LayoutError(
                "the grid and the tile have different numbers of axes",
                got=f"grid {grid}, tile_thw={self.tile_thw}",
                expected=f"a grid of {self.num_axes} axes",
                next_step=f"pass a tile with {len(grid)} sides, such as (8, 8) for images",
            )
        return self.tile_thw

    def check_gate(self, gate: bool) -> None:
        """Check that a gate is given where it is needed and not where it would be dropped.

        Raises:
            ConfigError: if the config names a gate and there is none, or is "ungated" and there is
                one.
        """
        if gate and self.gate == UNGATED:
            raise ConfigError(
                "a gate is given to an ungated config",
                got='a gate tensor and VSA(gate="ungated")',
                expected="one of the two",
                next_step="leave the gate out, or use VSA(gate=None)",
            )
        if not gate and self.gate_name is not None:
            raise ConfigError(
                "the config names a learned gate and none is given",
                got=f"gate=None and VSA(gate={self.gate_name!r})",
                expected="the gate's values, [batch, query heads, length, head_dim]",
                next_step="pass gate=, or use VSA(gate=None) for the sparse branch alone",
            )


def _require_sparsity(sparsity: object) -> None:
    is_number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not is_number or not 0 <= sparsity < 1:  # type: ignore[operator]
        raise ConfigError(
            "VSA.sparsity is out of range",
            got=repr(sparsity),
            expected="a number in [0, 1): the fraction of tiles to leave out",
            next_step="pass sparsity=0.9, for instance; a tensor goes to cs.attention(sparsity=)",
        )


def _require_gate(gate: object) -> None:
    if gate is not None and not (isinstance(gate, str) and gate.isidentifier()):
        raise ConfigError(
            "VSA.gate is no name of a module",
            got=repr(gate),
            expected='None, "ungated", or the name of a learned gate',
            next_step='pass gate="to_gate_compress"; a gate tensor goes to cs.attention(gate=)',
        )
