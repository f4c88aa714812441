"""Sliding-window block attention beside dense SDPA and flex_attention.

Bound: dense work times density. All heads and batch entries share one list.
"""

from __future__ import annotations

from typing import Any

import compiled_sparse as cs
from benchmarks.sta import measure
from compiled_sparse.pattern import swba_density

CASES = ((8192, 256, 4), (7000, 100, 8))
"""Length, block, window: blocks that divide the length, and blocks that do not."""


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all lengths of the suite."""
    results = []
    for length, block, window in CASES:
        config = cs.SWBA(block=block, window=window)
        density = swba_density(length, block, window)
        results += [measure(config, (length,), density, head_dim, rounds) for head_dim in (64, 128)]
    return results
