"""The mask search of sliding tile attention: what was measured, in the published form."""

from __future__ import annotations

from compiled_sparse.calibration.mask_search import MaskSearch
from compiled_sparse.calibration.measurements import CallKey
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.calibration.tables import Table
from compiled_sparse.calibration.tables import make_table
from compiled_sparse.config import STA
from compiled_sparse.errors import CalibrationError
from compiled_sparse.layout import tiles_along
from compiled_sparse.windows import Window


def full_window_of(measurements: Measurements) -> Window:
    """Return the window that is dense attention on the grid that was measured.

    Raises:
        CalibrationError: if candidates are no windows of one tile, or layers have other grids.
    """
    _require_windows(measurements)
    grids = {(site.grid_thw, tile) for site in measurements.layers for tile in site.tiles}
    if len(grids) != 1:
        raise CalibrationError(
            "windows are not counted in tiles of one size on one grid",
            got=f"(grid, tile) {sorted(grids)}",
            expected="one grid and one tile",
            next_step="search with one tile_thw, one resolution at a time",
        )
    ((grid, tile),) = grids
    return tuple(tiles_along(grid, tile))


def mask_searches(measurements: Measurements) -> dict[tuple[str, str], MaskSearch]:
    """Return the losses of each sample and branch, as one published file holds them.

    The full window is dense attention itself, which everything is compared with: its losses are 0.

    Args:
        measurements: Of candidates that are `STA` with one window each.

    Returns:
        From (sample, branch) to losses by window, step, layer and head. They are not rounded to six
        decimals as published ones are: many losses are smaller than that.

    Raises:
        CalibrationError: if candidates are something else, a sample lacks a step, or layers have
            other numbers of heads.
    """
    full = full_window_of(measurements)
    groups: dict[tuple[str, str], list[CallKey]] = {}
    for key in sorted(measurements.calls):
        groups.setdefault((key.sample, key.branch), []).append(key)
    return {group: _search(measurements, keys, full) for group, keys in groups.items()}


def _search(measurements: Measurements, keys: list[CallKey], full: Window) -> MaskSearch:
    steps = [key.step for key in keys]
    heads = {site.num_heads for site in measurements.layers}
    if steps != list(range(len(steps))) or len(heads) != 1:
        raise CalibrationError(
            "a search needs every step, and as many heads in every layer",
            got=f"steps {steps} of {keys[0].sample!r}, heads {sorted(heads)}",
            expected="steps 0, 1, 2, ... without a gap and one number of heads",
            next_step="measure all denoising steps of each sample",
        )
    shape = (len(keys), len(measurements.layers), heads.pop())
    zeros = make_table(shape, lambda step, layer, head: 0.0)

    def losses(name: str) -> dict[Window, Table[float]]:
        found = {
            window: _table(measurements, keys, index, name)
            for index, window in _windows(measurements)
        }
        return {**found, full: zeros}

    return MaskSearch(l2_loss=losses("squared_error"), l1_loss=losses("absolute_error"))


def _windows(measurements: Measurements) -> list[tuple[int, Window]]:
    return [
        (index, config.windows[0])
        for index, config in enumerate(measurements.candidates)
        if isinstance(config, STA)
    ]


def _table(measurements: Measurements, keys: list[CallKey], index: int, name: str) -> Table[float]:
    return tuple(
        tuple(getattr(site, name)[index] for site in measurements.calls[key]) for key in keys
    )


def _require_windows(measurements: Measurements) -> None:
    plain = [
        config
        for config in measurements.candidates
        if isinstance(config, STA) and config.table is None and len(config.windows) == 1
    ]
    if len(plain) != len(measurements.candidates):
        raise CalibrationError(
            "a mask search compares windows of sliding tile attention",
            got=", ".join(config.describe() for config in measurements.candidates),
            expected="STA with one window each",
            next_step='measure ["sta:window_thw=3x1x10,tile_thw=6x8x8", ...], for instance',
        )
