"""Autocast for mechanism ops: the casts `scaled_dot_product_attention` would have had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_sparse.ops.library import LIBRARY

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_autocast_like_sdpa(op_name: str) -> None:
    """Register the autocast kernels of a mechanism op.

    Floating-point inputs except float64 are cast to the autocast dtype, as SDPA's are.

    Args:
        op_name: Name of the op inside the namespace; it must be composite.
    """
    for device_type, key in _AUTOCAST_KEYS.items():
        LIBRARY.impl(op_name, _autocast_kernel(op_name, device_type, key), key)


def _autocast_kernel(op_name: str, device_type: str, key: str) -> Any:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(arg, device_type, dtype) for arg in args]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return getattr(torch.ops.compiled_sparse, op_name)(*cast)

    return kernel


def _cast(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_cast(each, device_type, dtype) for each in value]
    if not isinstance(value, Tensor) or value.device.type != device_type:
        return value
    # A 0-d tensor is a number of the call, such as a sparsity, that half precision would round.
    eligible = value.is_floating_point() and value.dtype != torch.float64 and value.dim() > 0
    return value.to(dtype) if eligible else value
