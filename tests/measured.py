"""Made-up measurements of a calibration, as small as they can be."""

from __future__ import annotations

import compiled_sparse as cs
from compiled_sparse.calibration import CallKey
from compiled_sparse.calibration import Measurements
from compiled_sparse.calibration import SiteErrors


def measured() -> Measurements:
    """Two windows at one attention call with two heads."""
    ones = ((0.5, 0.5), (0.25, 0.25))
    site = SiteErrors(
        path="blocks.0.attn1",
        kind="self",
        grid_thw=(4, 8, 8),
        text=(0, 0),
        head_dim=8,
        densities=(0.125, 0.25),
        tiles=((2, 4, 4),) * 2,
        squared_dense=(1.0, 1.0),
        squared_error=ones,
        absolute_error=ones,
        cosine=ones,
        captured_mass=ones,
    )
    candidates = tuple(cs.STA(window_thw=w, tile_thw=(2, 4, 4)) for w in ((1, 1, 1), (1, 2, 1)))
    return Measurements(candidates=candidates, calls={CallKey(): (site,)})
