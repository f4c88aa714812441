"""`compiled-sparse bench --tune`: find the fastest tiles of the GPU kernels, write them down."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compiled_sparse.errors import DeviceError

_ROUNDS_PER_TILE = 5


def tune_tiles(path: Path) -> dict[str, Any]:
    """Measure the tiles of the kernels on the present GPU and write a table of the fastest.

    Args:
        path: The table.

    Returns:
        What was done, as plain JSON values.

    Raises:
        DeviceError: if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise DeviceError(
            "tiles are measured on a GPU, and there is none",
            got="torch.cuda.is_available() is False",
            expected="a CUDA or ROCm device and a torch build for it",
            next_step="run this on the machine that the table is for",
        )
    from compiled_sparse.kernels import tune
    from compiled_sparse.kernels import tuning

    chip, device = tuning.current_chip(), torch.device("cuda")
    findings = []
    for finding in tune.tune(chip, device, _seconds):
        print(f"{finding.kernel} {finding.key}: {tuple(finding.tile)}", file=sys.stderr, flush=True)
        findings.append(finding)
    document = json.loads(tuning.SHIPPED.read_text())
    record = tune.updated(document["chips"][chip], findings)
    document["chips"][chip] = record | {
        "source": f"measured on {torch.cuda.get_device_name(device)}"
    }
    tuning.write_table(document, path)
    return {"chip": chip, "table": str(path), "entries": len(findings), "boxes": record["boxes"]}


def _seconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    try:
        return float(do_bench(call, rep=10 * _ROUNDS_PER_TILE, return_mode="median")) / 1e3
    except Exception:  # noqa: BLE001 - a tile that does not fit or compile is no candidate
        torch.cuda.synchronize()  # raises where it was the device that failed
        return math.inf
