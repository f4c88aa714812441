"""What the ops have in common: the dtype of sums, a product in it, the layout of outputs."""

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


def empty_like_blhd(tensor: Tensor) -> Tensor:
    """Allocate [B, H, L, D] over [B, L, H, D] memory: `transpose(1, 2).flatten(2)` is then free."""
    batch, heads, length, head_dim = tensor.shape
    return tensor.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the output of attention, like q over [B, L, H, D] memory, and its log-sum-exp."""
    return empty_like_blhd(q), q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


def resolve_scale(scale: float | None, q: Tensor) -> float:
    """Return the softmax scale; None means `head_dim ** -0.5`."""
    return float(q.shape[-1]) ** -0.5 if scale is None else scale
