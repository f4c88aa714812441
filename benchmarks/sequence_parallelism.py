"""What sequence parallelism costs on 8 to 64 GPUs: a MODEL, nothing here is measured.

python -m benchmarks.sequence_parallelism
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from compiled_sparse.distributed.cost import LayerCost
from compiled_sparse.distributed.cost import balance
from compiled_sparse.distributed.cost import two_levels
from compiled_sparse.distributed.cost import ulysses
from compiled_sparse.distributed.cost_inputs import Cluster
from compiled_sparse.distributed.cost_inputs import Layer
from compiled_sparse.distributed.cost_inputs import layer_of
from compiled_sparse.presets import geometry
from compiled_sparse.registry import KERNEL_EFFICIENCY

SHAPES = (
    ("wan2.1-t2v-14b", (81, 480, 832)),
    ("wan2.1-t2v-14b", (81, 720, 1280)),
    ("hunyuanvideo", (129, 720, 1280)),
)
GPUS = (8, 16, 32, 64)
DENSITIES = (1.0, 0.2, 0.1)
WINDOW_REACH_FRAMES = 4  # of the token grid: a window of three tiles of four frames
TITLES = (
    "model, tokens",
    "GPUs",
    "heads",
    "MB sent (least)",
    "exchange",
    "attention",
    "communication",
    "gain",
    "two levels",
    "window",
)


def rows() -> list[tuple[str, ...]]:
    """Return the cells of the table, row by row."""
    return [_row(name, video, gpus) for name, video in SHAPES for gpus in GPUS]


def _row(name: str, video: tuple[int, int, int], gpus: int) -> tuple[str, ...]:
    model = geometry(name)
    grid = model.grid_thw(*video)
    dense = layer_of(model, grid)
    cluster = Cluster(gpus=gpus)
    layers = [_sparse(dense, density) for density in DENSITIES]
    alone = [ulysses(each, Cluster(gpus=1)).total_s for each in layers]
    costs = [ulysses(each, cluster) for each in layers]
    rings = [two_levels(each, cluster) for each in layers]
    reach = WINDOW_REACH_FRAMES * grid[1] * grid[2]
    window = two_levels(layers[-1], cluster, reach_tokens=reach)
    return (
        f"`{name}`, {dense.video_tokens:,}",
        str(gpus),
        f"{balance(dense, gpus):.0%}",
        f"{costs[0].sent_bytes / 1e6:.0f} ({costs[0].least_bytes / 1e6:.0f})",
        f"{1e3 * costs[0].exchange_s:.1f} ms",
        f"{1e3 * costs[0].attention_s:.1f} ms",
        ", ".join(f"{each.communication_share:.0%}" for each in costs),
        _gains(alone, costs),
        _gains(alone, rings),
        _gains(alone[-1:], [window]),
    )


def _sparse(layer: Layer, density: float) -> Layer:
    efficiency = KERNEL_EFFICIENCY if density < 1.0 else 1.0
    return dataclasses.replace(layer, density=density, sparse_efficiency=efficiency)


def _gains(alone: Sequence[float], costs: Sequence[LayerCost]) -> str:
    return ", ".join(
        f"{seconds / cost.total_s:.1f}x" for seconds, cost in zip(alone, costs, strict=True)
    )


def main() -> None:
    """Print the inputs, and the table as markdown."""
    print("A MODEL of one layer's forward, not measured. Inputs:")
    for name, value in dataclasses.asdict(Cluster(gpus=1)).items():
        if name != "gpus":
            print(f"  {name} = {value:g}")
    print(f"  efficiency of sparse kernels = {KERNEL_EFFICIENCY:g}\n")
    for cells in (TITLES, ("---",) * len(TITLES), *rows()):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
