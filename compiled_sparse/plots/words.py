"""What a picture says about its mechanism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compiled_sparse.config import STA
from compiled_sparse.config import SWBA
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config_sla import SLA
from compiled_sparse.config_sla import SageSLA
from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.config_vsa import UNGATED
from compiled_sparse.config_vsa import VSA
from compiled_sparse.layout import Text
from compiled_sparse.layout import sequence_grid
from compiled_sparse.windows import Window

HIDDEN = "not attended to"


@dataclass(frozen=True)
class Words:
    """What to call things in a picture.

    Args:
        mechanism: Name and parameters.
        query: What the frames are seen from.
        hidden: What becomes of the keys that have no colour.
        mask: What a coloured cell of the block mask means.
    """

    mechanism: str
    query: str = "query tile"
    hidden: str = HIDDEN
    mask: str = "a query block attends to the coloured key blocks"


def words_for(config: MechanismConfig, tile: tuple[int, ...], head: int) -> Words:
    """Return what to say of a config; of one nobody here knows, its spec string.

    Args:
        config: The mechanism, with plain windows.
        tile: Sides of a query block.
        head: The head that is shown.
    """
    describe = _DESCRIBE.get(type(config))
    return Words(config.describe()) if describe is None else describe(config, tile, head)


def times(extents: tuple[int, ...]) -> str:
    """Return extents as 2×6×8."""
    return "×".join(map(str, extents))


def tokens_on(grid: tuple[int, ...], text: Text) -> str:
    """Return a grid and the number of tokens in words."""
    (length,) = sequence_grid(grid, text.before, text.after)
    of_text = text.before + text.after
    return f"{times(grid)} ({length:,} tokens" + f", {of_text:,} of them text" * (of_text > 0) + ")"


def _dense(config: Dense, tile: tuple[int, ...], head: int) -> Words:
    return Words(f"Dense attention, in blocks of {times(tile)} tokens", "query block")


def _sta(config: STA, tile: tuple[int, ...], head: int) -> Words:
    window: Window = config.windows[head if len(config.windows) > 1 else 0]
    return Words(f"Sliding tile attention, window {times(window)} tiles of {times(tile)} tokens")


def _swba(config: SWBA, tile: tuple[int, ...], head: int) -> Words:
    blocks = f"window {config.window} blocks of {config.block} tokens"
    return Words(f"Sliding-window block attention, {blocks}", "query block")


def _vsa(config: VSA, tile: tuple[int, ...], head: int) -> Words:
    left_out = f"sparsity {config.sparsity:g}, tiles of {times(tile)} tokens"
    hidden = "all others through the compressed branch alone"
    if config.gate is None:
        hidden = f"{HIDDEN}, but for the compressed branch of a gate"
    if config.gate == UNGATED:
        left_out += ", ungated"
    return Words(f"Video sparse attention, {left_out}", hidden=hidden)


def _sla(config: SLA, tile: tuple[int, ...], head: int) -> Words:
    bits = " in eight bits" if isinstance(config, SageSLA) else ""
    blocks = f"{times(config.query_tile)} queries by {times(config.key_tile)} keys"
    return Words(
        f"Sparse-linear attention{bits}, {config.topk_ratio:g} of the key blocks, {blocks}",
        "query block",
        HIDDEN if config.proj is None else "all others through the linear branch alone",
    )


def _vmoba(config: VMoBA, tile: tuple[int, ...], head: int) -> Words:
    kind = {"st": "spatio-temporal"}.get(config.kind, config.kind)
    share = f"{config.topk} of them for a query"
    if config.moba_select_mode == "threshold":
        share = f"threshold {config.moba_threshold:g}"
    return Words(
        f"Mixture-of-block attention, {kind} chunks of {times(tile)} tokens, {share}",
        "query token",
        mask="some query of a chunk attends to the coloured chunks",
    )


_DESCRIBE: dict[type, Callable[[Any, tuple[int, ...], int], Words]] = {
    Dense: _dense,
    STA: _sta,
    SWBA: _swba,
    VSA: _vsa,
    SLA: _sla,
    SageSLA: _sla,
    VMoBA: _vmoba,
}
