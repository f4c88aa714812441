"""Which dtype sums are taken in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums over values of a tensor: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return a matrix product, summed in float32 and rounded once: slow in half dtypes on CPUs."""
    if left.device.type != "cpu":
        return left @ right
    compute = compute_dtype(left)
    return (left.to(compute) @ right.to(compute)).to(left.dtype)
