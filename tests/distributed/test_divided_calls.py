"""Models whose tokens are divided among processes, said by metadata: as on one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from divided import Case
from divided import compare
from processes import values

import compiled_sparse as cs

TILE = (2, 3, 2)
STA = cs.STA(window_thw=(1, 3, 3), tile_thw=TILE)
BY_HEAD = cs.STA(window_thw=((1, 1, 3), (3, 1, 1), (1, 3, 1)), tile_thw=TILE)
TABLE = cs.WindowTable(
    windows=((1, 1, 1), (3, 3, 1), (1, 3, 3)),
    choice=(((0, 1, 2), (2, 1, 0)), ((1, 1, 1), (2, 0, 1))),
)
GATED = cs.VSA(sparsity=0.6, tile_thw=TILE, gate="to_gate_compress")
SLA = cs.SLA(topk_ratio=0.3, block_q=8, block_k=4)
CHUNKS = {"temporal_chunk_size": 1, "temporal_topk": 2, "spatial_chunk_size": (3, 5)}
MOBA = cs.VMoBA(
    **CHUNKS, spatial_topk=1, st_chunk_size=(2, 3, 5), st_topk=2, moba_select_mode="topk"
)
TEXT = cs.Text(after=5)
BOTH = cs.Text(before=3, after=4)

CALLS = 2
"""Attention calls of the model."""

HARD = [
    Case(policy=GATED, heads=3, attach=True, grid=(5, 7, 3), text=BOTH),
]
CASES = [
    Case(policy="dense", text=BOTH, heads=3),
    Case(policy=STA, text=TEXT, masked=True),
    Case(policy=STA, heads=6, key_heads=2, grid=(5, 7, 3)),
    Case(policy=BY_HEAD, heads=3, text=BOTH),
    Case(policy=cs.STA(window_thw=TABLE, tile_thw=TILE), heads=3, step=1, attach=True),
    Case(policy=cs.VSA(sparsity=0.6, tile_thw=TILE), text=TEXT, grid=(5, 7, 3)),
    Case(policy=GATED, attach=True),
    Case(policy=cs.VSA(sparsity=0.6, tile_thw=TILE, gate="ungated"), heads=1),
    Case(policy=SLA, attach=True, heads=3),
    Case(policy=SLA, text=TEXT, grid=(5, 7, 3)),
    Case(policy=cs.SageSLA(topk_ratio=0.3), training=False, head_dim=64, grid=(8, 12, 10)),
    Case(policy=MOBA, attach=True, grid=(4, 6, 10)),
    Case(policy=cs.SWBA(block=8, window=3), grid=(5, 7, 3), heads=3),
    Case(policy=STA, inner="inductor", heads=3, grid=(5, 7, 3)),
    Case(policy=GATED, inner="inductor", attach=True),
]


RING_GRID = (12, 3, 2)
RINGS = [
    Case(policy=cs.STA(window_thw=(3, 1, 1), tile_thw=(1, 3, 2)), grid=RING_GRID, ring=True),
    Case(
        policy=cs.STA(window_thw=BY_HEAD.windows, tile_thw=(1, 3, 2)),
        heads=3,
        grid=RING_GRID,
        text=BOTH,
        ring=True,
    ),
    Case(policy="dense", grid=RING_GRID, text=TEXT, heads=3, ring=True),
    Case(policy=cs.SWBA(block=6, window=3), grid=RING_GRID, ring=True, inner="inductor"),
]


def _check(size: int, cases: list[Case]) -> None:
    for rank, found in enumerate(values(size, compare, cases, limit_s=500)):
        for case, each in zip(cases, found, strict=True):
            assert max(each["errors"].values()) < 2e-5, (rank, case, each)
            _check_counts(size, case, each)


def _check_counts(size: int, case: Case, found: dict[str, Any]) -> None:
    if case.ring:
        assert found["sparse"] > 0
        return
    exchanges = 0 if size == 1 else 2 * CALLS
    if case.masked and size > 1:
        exchanges += 1  # of the mask, which all calls share
    assert (found["exchanges"], found["others"]) == (exchanges, 0), case
    assert (found["sparse"] > 0) == (case.policy != "dense"), case


def test_two_processes_compute_what_one_does() -> None:
    _check(2, HARD)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_mechanism_gives_on_several_processes_what_it_gives_on_one(size: int) -> None:
    # Tracing a backward pass takes most of the time, and is the same for any number of processes.
    light = [case if case.inner == "inductor" else replace(case, inner="eager") for case in CASES]
    _check(size, CASES if size == 2 else light if size == 4 else light[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_keys_that_go_round_a_ring_give_what_one_process_does(size: int) -> None:
    _check(size, RINGS)
