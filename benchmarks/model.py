"""A whole diffusers Wan transformer: this backend beside plain torch.compile, and compile times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import compiled_sparse as cs
from benchmarks.timing import interleaved_medians

GRID, TILE, WINDOW = (8, 30, 32), (4, 5, 4), (1, 3, 3)
HEADS, HEAD_DIM, LAYERS = 4, 64, 2


def _model() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    model: torch.nn.Module = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=LAYERS,
    )
    return model.eval()


def _first_call(compiled: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    compiled(*inputs)
    return time.perf_counter() - start


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure one model: time per forward, speed-up, and seconds to the first output."""
    model = _model()
    frames, height, width = GRID
    inputs = (torch.randn(1, 16, frames, 2 * height, 2 * width), torch.tensor([5.0]))
    inputs = (*inputs, torch.randn(1, 32, 64))
    config = cs.STA(window_thw=WINDOW, tile_thw=TILE)
    report = cs.explain(model, *inputs, policy=config)
    torch.compiler.reset()
    dense = torch.compile(model)
    sparse = torch.compile(model, backend="compiled_sparse", options={"policy": config})
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        # Inductor compiles its headers once per cache: neither side should pay for that.
        torch.compile(lambda x: x.sin() + 1)(torch.randn(64, 64))
        first = {
            "dense": _first_call(dense, inputs),
            "compiled_sparse": _first_call(sparse, inputs),
        }
        seconds = interleaved_medians(
            {"dense": lambda: dense(*inputs), "compiled_sparse": lambda: sparse(*inputs)}, rounds
        )
    return [
        {
            "case": f"Wan {LAYERS} layers {HEADS}x{HEAD_DIM} {config.describe()}",
            "tokens": frames * height * width,
            "density": next(site.density for site in report.sites if site.is_sparse),
            "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
            "speed_up_over_dense": {n: seconds["dense"] / value for n, value in seconds.items()},
            "first_call_seconds": first,
        }
    ]
