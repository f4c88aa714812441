"""What an audit depends on, as one number: a record of the same sources need not be made again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[2]
SOURCES = (
    *(
        "compiled_sparse/kernels/*.py",
        "compiled_sparse/kernels/*.json",
        "compiled_sparse/layout.py",
    ),
    *("compiled_sparse/ops/gpu*.py", "compiled_sparse/ops/bit_masks.py"),
    *("compiled_sparse/ops/quantization.py", "compiled_sparse/ops/video.py"),
    "benchmarks/audit/*.py",
)


def fingerprint(root: Path = ROOT) -> str:
    """Return a digest of the kernels, of what launches them, of the audit, and of versions.

    Args:
        root: The repository.
    """
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    paths = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
