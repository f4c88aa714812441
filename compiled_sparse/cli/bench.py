"""`compiled-sparse bench`: sparse attention beside dense on this machine, and tuning of kernels."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_pattern_arguments
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.measure import TOLERANCE
from compiled_sparse.cli.measure import medians
from compiled_sparse.config import STA
from compiled_sparse.errors import DeviceError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.attention import attention
from compiled_sparse.pattern import sta_density

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
_ROUNDS_PER_TILE = 5


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time sparse attention beside dense on this machine",
        description="Time one sparse attention call beside dense attention on this machine, or "
        "find the fastest tiles of the GPU kernels.",
        epilog="examples:\n"
        "  compiled-sparse bench --grid 8 24 40 --heads 4\n"
        "  compiled-sparse bench --tune tiles.json    (on a GPU; COMPILED_SPARSE_TUNING=tiles.json "
        "then uses it)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pattern_arguments(parser, grid=(8, 24, 40), window=(3, 3, 3), tile=(4, 6, 8))
    parser.add_argument("--heads", type=count(1), default=4, help="default %(default)s")
    parser.add_argument("--head-dim", type=count(1), default=64, help="default %(default)s")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument("--rounds", type=count(1), default=7, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tune",
        type=Path,
        metavar="TABLE",
        help="measure the tiles of the GPU kernels instead and write a table of the fastest",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, or tune, and print what was found."""
    result = _tune(arguments.tune) if arguments.tune else _measure(arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:<16}{_shown(value)}" for name, value in result.items()))
    return 0


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid, tile = tuple(arguments.grid), tuple(arguments.tile)
    config = STA(window_thw=tuple(arguments.window), tile_thw=tile)
    shape = (1, math.prod(grid), arguments.heads, arguments.head_dim)
    q, k, v = (
        torch.randn(shape, device=device).to(_DTYPES[arguments.dtype]).transpose(1, 2)
        for _ in range(3)
    )
    calls = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "sparse": lambda: attention(q, k, v, config, grid_thw=grid),
    }
    with torch.no_grad():
        waiting = {name: _waiting_for(device, call) for name, call in calls.items()}
        for call in waiting.values():
            call()
        seconds = medians(waiting, arguments.rounds, lambda: None)
    density = sta_density(BlockLayout(grid, tile), config.windows)
    return {
        "device": _name_of(device),
        "config": config.describe(),
        "grid": list(grid),
        "density": density,
        "dense_ms": 1e3 * seconds["dense"],
        "sparse_ms": 1e3 * seconds["sparse"],
        "speed_up": seconds["dense"] / seconds["sparse"],
        "limit": 1 / density,
    }


def _tune(path: Path) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise DeviceError(
            "tiles are measured on a GPU, and there is none",
            got="torch.cuda.is_available() is False",
            expected="a CUDA or ROCm device and a torch build for it",
            next_step="run this on the machine that the table is for",
        )
    from triton.testing import do_bench

    from compiled_sparse.kernels import tune
    from compiled_sparse.kernels import tuning

    def measure(call: Callable[[], None]) -> float:
        try:
            return float(do_bench(call, rep=10 * _ROUNDS_PER_TILE, return_mode="median")) / 1e3
        except Exception:  # noqa: BLE001 - a tile that does not fit or compile is no candidate
            torch.cuda.synchronize()  # raises where it was the device that failed
            return math.inf

    chip, device = tuning.current_chip(), torch.device("cuda")
    findings = []
    for finding in tune.tune(chip, device, measure):
        print(f"{finding.kernel} {finding.key}: {tuple(finding.tile)}", file=sys.stderr, flush=True)
        findings.append(finding)
    document = json.loads(tuning.SHIPPED.read_text())
    record = tune.updated(document["chips"][chip], findings)
    document["chips"][chip] = record | {"source": f"measured on {_name_of(device)}"}
    tuning.write_table(document, path)
    return {"chip": chip, "table": str(path), "entries": len(findings), "boxes": record["boxes"]}


def _waiting_for(device: torch.device, call: Callable[[], object]) -> Callable[[], None]:
    def wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return wait


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
