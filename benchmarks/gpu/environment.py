"""The machine a record was made on, and what its chip could do at best."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import environment as processor_environment

# Dense bf16 TFLOP/s and memory TB/s by parts of the device's name, most specific first; makers'
# data sheets, without sparsity. What is not listed has no peak, and its record no MFU.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("H100 PCIe", 756.0, 2.0),
    ("H100 NVL", 835.0, 3.9),
    ("H100", 989.4, 3.35),
    ("H800", 989.4, 3.35),
    ("GH200", 989.4, None),
    ("H200", 989.4, 4.8),
    ("GB200", 2500.0, 8.0),
    ("B200", 2250.0, 8.0),
    ("A100-PCIE-40GB", 312.0, 1.555),
    ("A100-SXM4-40GB", 312.0, 1.555),
    ("A100 80GB PCIe", 312.0, 1.935),
    ("A100", 312.0, 2.039),
    ("A800", 312.0, None),
    ("L40S", 362.0, 0.864),
    ("RTX 4090", 165.2, 1.008),
    ("RTX 5090", 209.5, 1.792),
)


def peaks(device_name: str) -> tuple[float | None, float | None]:
    """Return peak bf16 TFLOP/s and TB/s of a chip, None where unknown."""
    for part, tflops, bandwidth in PEAKS:
        if part in device_name:
            return tflops, bandwidth
    return None, None


def device_name(device: str) -> str:
    """Return the name of the chip that is measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(processor_environment()["processor"])


def environment(device: str) -> dict[str, Any]:
    """Return chip, versions, commit and date; null where a fact cannot be found."""
    name = device_name(device)
    tflops, bandwidth = peaks(name)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": name,
        "peak_bf16_tflops": tflops,
        "peak_memory_terabytes_per_second": bandwidth,
        "processor_cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["memory_gibibytes"] = round(properties.total_memory / 2**30, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_mebibytes"] = round(properties.L2_cache_size / 2**20, 1)
    return facts


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _commit() -> str | None:
    return _command("git", "rev-parse", "HEAD") or os.environ.get("GIT_COMMIT")


def _command(*arguments: str) -> str | None:
    """Return the first line a command prints, None if it is missing or fails."""
    try:
        result = subprocess.run(
            arguments, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0] if result.returncode == 0 and lines else None
