"""The named quality levels as plain numbers; `cs.quality` makes policies of them.

Early steps fix the composition of a video and later ones its detail, and the first layers mix the
patches, so the careful levels leave these dense.
"""

from __future__ import annotations

from dataclasses import dataclass

from compiled_sparse.config import Auto


@dataclass(frozen=True)
class Level:
    """What one name stands for.

    Args:
        config: The automatic choice, with its numbers.
        dense_first_steps: Denoising steps at the start that stay dense.
        dense_first_layers: Video attention layers at the start that stay dense.
    """

    config: Auto
    dense_first_steps: int = 0
    dense_first_layers: int = 0


LEVELS: dict[str, Level] = {
    "exact": Level(Auto(window_fraction=1.0, min_tokens=0, min_gain=0.0)),
    "careful": Level(
        Auto(window_fraction=0.8, min_gain=1.1), dense_first_steps=12, dense_first_layers=2
    ),
    "balanced": Level(Auto(window_fraction=0.6), dense_first_steps=8),
    "fast": Level(Auto(window_fraction=0.4), dense_first_steps=4),
}
