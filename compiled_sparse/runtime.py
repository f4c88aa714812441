"""Tensors that carry call-time values into compiled graphs.

One immutable tensor per value and device, never written to again: two threads at different steps,
and a backward pass that recomputes after the step has moved on, each keep the tensor they had.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from compiled_sparse.errors import ConfigError
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.windows import WindowTable

_CACHE_SIZE = 1024


@lru_cache(maxsize=_CACHE_SIZE)
def index_tensor(value: int, device: torch.device) -> Tensor:
    """Return a step or layer index as a tensor without dimensions, int64."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.int64, device=device)


@lru_cache(maxsize=_CACHE_SIZE)
def sparsity_tensor(value: float, device: torch.device) -> Tensor:
    """Return a sparsity as a tensor without dimensions, float64, which autocast leaves alone."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float64, device=device)


@lru_cache(maxsize=_CACHE_SIZE)
def table_tensor(table: WindowTable, device: torch.device) -> Tensor:
    """Return the windows of a table, int64 [steps, layers, heads, axes]."""
    with torch.inference_mode(False):
        palette = torch.tensor(table.windows, device="cpu")
        return palette[torch.tensor(table.choice, device="cpu")].to(device)


def call_tensor(
    name: str, call: CallMetadata, device: torch.device, table: WindowTable | None = None
) -> Tensor:
    """Return what a mechanism reads under a name; what nobody said of a call counts as 0.

    Args:
        name: "step", "sparsity", "given_sparsity" or "windows".
        call: Step and sparsity.
        device: Where the tensor lives.
        table: The table of the mechanism's config.

    Raises:
        ConfigError: if windows are read and the config has no table.
    """
    if name == "step":
        return index_tensor(call.step or 0, device)
    if name in ("sparsity", "given_sparsity"):
        return sparsity_tensor(call.sparsity or 0.0, device)
    if table is None:
        raise ConfigError(
            "a mechanism reads a table of windows that its config does not have",
            got="config.table is None",
            expected="a config whose property `table` is a WindowTable",
            next_step="define the property, or leave 'windows' out of the runtime inputs",
        )
    return table_tensor(table, device)
