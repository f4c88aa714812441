"""What does not go round a ring, and that it is said before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from ring_error_cases import GROUP
from ring_error_cases import attend

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.ring import ring_attention
from compiled_sparse.distributed.ring import ring_refusal
from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import DeviceError
from compiled_sparse.errors import DistributedError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import ShapeError

GRID = (24, 4, 4)
TABLE = cs.WindowTable(windows=((1, 1, 1), (3, 3, 3)), choice=(((0,),), ((1,),)))


@dataclass(frozen=True, kw_only=True)
class Foreign(MechanismConfig):
    name: ClassVar[str] = "foreign"


@dataclass(frozen=True, kw_only=True)
class Changed(cs.STA):
    """A class of another package may mean something else by its windows."""


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (cs.VSA(sparsity=0.5), "vsa:sparsity=0.5,tile_thw=4x4x4"),
        (cs.VSA(sparsity=0.5), "selects tiles by comparing the means of all of them"),
        (cs.SLA(), "its linear branch sums over all keys"),
        (cs.SageSLA(), "smooths keys by their overall mean"),
        (cs.VMoBA(), "each query selects among the chunks of all keys"),
        (cs.Auto(), "it chooses a mechanism only inside the compiler"),
        (Foreign(), "foreign: nobody can tell"),
        (Changed(), "nobody can tell"),
        (cs.STA(window_thw=TABLE), "config.at(step, layer)"),
    ],
)
def test_what_needs_all_keys_at_once_is_refused(config: MechanismConfig, reason: str) -> None:
    assert reason in str(ring_refusal(config, size=2, grid_thw=GRID))
    with pytest.raises(DistributedError, match="cannot go round a ring"):
        attend(config=config, grid_thw=GRID)


def test_a_row_of_a_table_is_taken() -> None:
    assert ring_refusal(cs.STA(window_thw=TABLE).at(1, 0), size=2, grid_thw=GRID) is None


@pytest.mark.parametrize(
    ("config", "size", "grid", "said"),
    [
        (
            cs.STA(tile_thw=(6, 8, 8)),
            3,
            (24, 30, 52),
            "24 frames in tiles of 6 on 3 ranks, which takes a multiple of 18 frames; "
            "24 fit 2 or 4 ranks",
        ),
        (
            cs.STA(tile_thw=(6, 8, 8)),
            2,
            (21, 30, 52),
            "21 frames in tiles of 6 on 2 ranks, which takes a multiple of 12 frames",
        ),
        (
            cs.STA(window_thw=(3, 3), tile_thw=(4, 4)),
            3,
            (8, 8),
            "8 tokens of the slowest axis in tiles of 4 on 3 ranks, which takes a multiple of 12 "
            "tokens of the slowest axis; 8 fit 2 ranks",
        ),
        (
            cs.SWBA(block=16),
            4,
            (3, 4, 8),
            "96 tokens in tiles of 16 on 4 ranks, which takes a multiple of 64 tokens; "
            "96 fit 3 or 6 ranks",
        ),
        (cs.Dense(), 2, (3, 5, 7), "105 tokens in tiles of 1 on 2 ranks"),
    ],
)
def test_a_cut_through_tiles_is_refused_with_what_would_fit(
    config: MechanismConfig, size: int, grid: tuple[int, ...], said: str
) -> None:
    assert str(ring_refusal(config, size=size, grid_thw=grid)).find(said) > 0


def test_blocks_of_a_sequence_with_text_are_refused() -> None:
    reason = ring_refusal(cs.SWBA(block=4), size=2, grid_thw=GRID, text=cs.Text(after=1))
    assert "Text(before=0, after=1): its blocks run through the text" in str(reason)
    assert ring_refusal(cs.SWBA(block=4), size=2, grid_thw=GRID, text=cs.Text()) is None


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ConfigError, {"config": cs.STA(window_thw=((1, 1, 1),) * 3, tile_thw=(3, 2, 2))}),
        (LayoutError, {"grid_thw": (6, 16)}),
        (LayoutError, {"grid_thw": (6, 4, 0)}),
        (ShapeError, {"length": 51}),
        (DtypeError, {"key_mask": torch.ones(1, 100)}),
        (DeviceError, {"key_mask": torch.ones(1, 100, dtype=torch.bool, device="meta")}),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_sent(
    error: type[CompiledSparseError], changes: dict[str, object]
) -> None:
    with pytest.raises(error):
        attend(**changes)


def test_values_of_another_length_are_said_before_anything_is_sent() -> None:
    q = torch.zeros(1, 2, 52, 8)
    text = cs.Text(after=4)
    with pytest.raises(ShapeError, match="do not fit"):
        ring_attention(q, q, q[:, :, 1:], cs.Dense(), group=GROUP, grid_thw=(6, 4, 4), text=text)
