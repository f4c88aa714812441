"""The table of tiles: complete, read by the nearest chip, and made by measuring."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compiled_sparse.kernels import tune
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.candidates import HEAD_DIMS
from compiled_sparse.kernels.candidates import OWN_ROWS
from compiled_sparse.kernels.candidates import candidates
from compiled_sparse.kernels.tuning import Tile

NVIDIA = "cuda"  # device: Triton's name of a compiler


def test_the_shipped_table_has_a_candidate_for_every_entry() -> None:
    for chip in tuning.CHIPS:
        for kernel in (*tuning.KERNELS, *tuning.CHUNK_KERNELS):
            if kernel == "forward_boxes" and chip not in tuning.BULK_COPY_CHIPS:
                continue
            kinds = tuning.KINDS if chip.startswith("sm_") else ("half", "float32")
            for kind in ("half",) if kernel == "forward_boxes" else kinds:
                for head_dim in HEAD_DIMS:
                    for own in OWN_ROWS:
                        tile = tuning.table()[chip][kernel][f"{kind}:{head_dim}:{own}"]
                        assert tile in set(candidates(kernel, kind, head_dim, own))


def test_the_shipped_table_says_where_it_comes_from() -> None:
    for record in json.loads(tuning.SHIPPED.read_text())["chips"].values():
        assert record["source"].startswith(("chosen offline", "measured on "))
        # A variant that no device has run is no default.
        assert record["source"].startswith("measured") or not record.get("boxes")


@pytest.mark.parametrize("chip", tuning.CHIPS)
def test_a_chip_is_described_by_its_part_of_the_table(
    chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuning.BOXES_VARIABLE, "1")
    described = tuning.describe(chip)
    record = json.loads(tuning.SHIPPED.read_text())["chips"][chip]
    assert described["source"] == record["source"]
    assert (described["table"], described["boxes"]) == (str(tuning.SHIPPED), "yes")


@pytest.mark.parametrize(
    ("backend", "arch", "chip"),
    [
        (NVIDIA, 80, "sm_80"),
        (NVIDIA, 86, "sm_80"),
        (NVIDIA, 89, "sm_89"),
        (NVIDIA, 90, "sm_90"),
        (NVIDIA, 100, "sm_100"),
        (NVIDIA, 103, "sm_100"),
        (NVIDIA, 121, "sm_120"),
        (NVIDIA, 75, "sm_80"),
        ("hip", "gfx950", "gfx942"),
    ],
)
def test_an_unknown_chip_is_taken_for_the_nearest_older_one(
    backend: str, arch: object, chip: str
) -> None:
    assert tuning.chip_of(backend, arch) == chip


@pytest.mark.parametrize(
    ("size", "rows"),
    [(64, 64), (128, 128), (384, 128), (60, 64), (100, 128), (192, 64), (12, 16), (320, 64)],
)
def test_blocks_are_cut_with_little_waste(size: int, rows: int) -> None:
    assert tuning.chunk_rows(size, 128) == rows


def test_pairs_are_joined_only_where_two_blocks_fit() -> None:
    pairs = Tile(own=64, other=128, warps=8, stages=2, joined=True)
    kernel = tuning.table()["sm_90"]["forward"]
    before = kernel["half:128:64"]
    kernel["half:128:64"] = pairs
    try:
        assert tuning.choose("forward", "sm_90", "half", 128, 64, 64) == pairs
        assert not tuning.choose("forward", "sm_90", "half", 128, 64, 128).joined
    finally:
        kernel["half:128:64"] = before


def test_the_environment_names_another_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(tuning.SHIPPED.read_text())
    document["chips"]["sm_90"]["boxes"] = True
    path = tmp_path / "tiles.json"
    tuning.write_table(document, path)
    assert json.loads(path.read_text()) == document
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
    caches = (tuning.table, tuning._document, tuning._chips_with_boxes)
    for cache in caches:
        cache.cache_clear()
    try:
        assert tuning.wants_boxes("sm_90")
        assert not tuning.wants_boxes("sm_100")
        monkeypatch.setenv(tuning.BOXES_VARIABLE, "0")
        assert not tuning.wants_boxes("sm_90")
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


def test_tuning_keeps_the_fastest_tile_of_each_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "HEAD_DIMS", (64,))
    monkeypatch.setattr(tune, "OWN_ROWS", (64,))
    monkeypatch.setattr(tune, "_GRID", (4, 4, 8))
    monkeypatch.setattr(tune, "_HEADS", 1)
    monkeypatch.setattr(tune.attention, "forward_rows", lambda *_: None)
    monkeypatch.setattr(tune.attention, "forward_boxes", lambda *_: None)

    def measure(call: Callable[[], None]) -> float:
        (tile,) = tuning._demanded.values()
        (kernel,) = tuning._demanded
        if tile.stages == 3:
            return math.inf  # as if it did not fit
        return tile.other * (0.5 if kernel == "forward_boxes" else 1.0)

    findings = list(tune.tune("sm_90", torch.device("cpu"), measure))
    assert [finding.kernel for finding in findings] == list(tuning.KERNELS)
    assert {finding.tile.other for finding in findings} == {16}
    record = json.loads(tuning.SHIPPED.read_text())["chips"]["sm_90"]
    changed = tune.updated(record, findings)
    assert changed["boxes"] is True
    assert changed["tiles"]["forward"]["half:64:64"] == list(findings[0].tile)
    assert changed["tiles"]["forward"]["tf32:64:64"] == record["tiles"]["forward"]["tf32:64:64"]
