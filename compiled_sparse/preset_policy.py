"""A policy for a published model, chosen by geometry, not tuned for quality."""

from __future__ import annotations

from compiled_sparse import registry
from compiled_sparse.config import Auto
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import auto_tile
from compiled_sparse.policy import CATCH_ALL
from compiled_sparse.policy import Policy
from compiled_sparse.policy import quality
from compiled_sparse.presets import geometry


def preset_policy(
    name: str,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    level: str = "balanced",
) -> Policy:
    """Return a policy for a published model, chosen by geometry, not tuned for quality.

    Training-free STA with the tile and the window that automatic mode takes on the video's grid at
    a quality level, and the level's dense steps and layers. Unlike `cs.quality(level)` it names the
    mechanism, so that it holds on GPUs, too, and where automatic mode would predict no gain: ask
    `compiled-sparse plan` first.

    Args:
        name: One of `compiled_sparse.presets.MODELS`.
        frames: Number of frames; None for the model's usual one, as for the other two.
        height: Rows in pixels.
        width: Columns in pixels.
        level: Name of a quality level.

    Raises:
        UnknownModelError: if the model is not known.
        LayoutError: if the model has no token grid for the video.
        ConfigError: if there is no such level.
    """
    model = geometry(name)
    policy = quality(level)
    ((_, auto),) = policy.rules
    grid = model.grid_thw(frames, height, width)
    layout = BlockLayout(grid, auto_tile(grid), model.text.before, model.text.after)
    automatic = registry.automatic().automatic
    assert automatic is not None
    assert isinstance(auto, Auto)
    return Policy(
        {CATCH_ALL: automatic(auto, layout)},
        dense_first_steps=policy.dense_first_steps,
        dense_first_layers=policy.dense_first_layers,
    )
