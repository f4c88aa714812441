"""What a calibration costs: one measured call of a model beside the attention that it measures."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

import compiled_sparse as cs
from benchmarks.timing import interleaved_medians
from compiled_sparse import calibration
from compiled_sparse.cli.wan import build_model

GRID, TILE = (8, 16, 32), (2, 4, 8)
LAYERS, HEADS, HEAD_DIM = 12, 4, 64
WINDOWS = ((3, 3, 3), (1, 3, 3), (3, 1, 3), (3, 3, 1), (1, 1, 4), (4, 1, 1))


def run(rounds: int) -> list[dict[str, Any]]:
    """Time calls of a 12-layer Wan at 4096 tokens with six candidate windows.

    The bound is the attention itself: dense and every candidate once in every layer.
    """
    candidates = [cs.STA(window_thw=window, tile_thw=TILE) for window in WINDOWS]
    model = build_model(
        GRID, layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32, seed=0
    )
    shape = (1, HEADS, torch.Size(GRID).numel(), HEAD_DIM)
    q, k, v = (torch.randn(shape) for _ in range(3))
    compiled = torch.compile(model.module.forward)  # its __call__ is what is recorded
    steps = itertools.count()

    def attention() -> None:
        for _ in range(LAYERS):
            F.scaled_dot_product_attention(q, k, v)
            for candidate in candidates:
                cs.attention(q, k, v, candidate, grid_thw=GRID)

    with (
        torch.no_grad(),
        calibration.recording(model.module, candidates) as found,
    ):

        def measured() -> None:
            with cs.metadata(step=next(steps)):
                model.run(model.module)

        def plain() -> None:
            compiled(**model.inputs)

        functions = {"measured call": measured, "plain call": plain, "attention": attention}
        seconds = interleaved_medians(functions, rounds)
        mean = found.measurements.mean("captured_mass").mean((0, 1, 3)).tolist()
    return [
        {
            "case": f"Wan, {LAYERS} layers, {shape[2]} tokens, {len(WINDOWS)} windows",
            "seconds": seconds,
            "over_attention": seconds["measured call"] / seconds["attention"],
            "captured_mass": dict(zip(map(str, WINDOWS), mean, strict=True)),
        }
    ]
