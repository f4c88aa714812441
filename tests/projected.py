"""The eager reference for attached models with learned projections."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gated import Gated
from gated import open_gates
from layered import Call
from modules import GRID
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.attach import Handle
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import Text

PROJ = "proj_l"
CONFIG = cs.SLA(topk_ratio=0.3, block_q=8, block_k=4)
BOXES = cs.SLA(topk_ratio=0.3, block_q=(2, 3, 2), block_k=(1, 2, 3), feature_map="elu")
open_projections = open_gates


class Projected(Gated):
    """Run attention calls by the reference, with the projection of the module that makes them.

    Args:
        calls: Config and text of each call in the order of execution; None leaves it as it is.
        model: An attached model that is run eagerly inside.
        handle: Knows its gates and projections.
        grid: The token grid.
    """

    def __init__(
        self,
        calls: Sequence[Call | None],
        model: nn.Module,
        handle: Handle,
        grid: tuple[int, ...] = GRID,
    ) -> None:
        super().__init__(calls, model, handle.gates, grid)
        self._layer: nn.Module | None = None
        for path in handle.projections:
            parent, _, name = path.rpartition(".")
            attention = model.get_submodule(parent)
            self._hooks.append(attention.register_forward_pre_hook(self._enter(name)))

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, _args: Any) -> None:
            self._layer = module.get_submodule(name)

        return hook

    def gate(self, query: Tensor, text: Text) -> Tensor | None:
        """Return the gate of calls that have one."""
        call = self.calls[self.count - 1]
        assert call is not None
        return super().gate(query, text) if isinstance(call[0], cs.VSA) else None

    def projection(self, config: MechanismConfig) -> tuple[Tensor, Tensor | None] | None:
        """Return what the module's layer computes, as weight and bias."""
        if config.projection_name is None or self._layer is None:
            return None
        like = next(self._layer.parameters())
        rows = torch.eye(int(self._layer.in_features), dtype=like.dtype)
        with torch.autocast("cpu", enabled=False):
            bias = self._layer(torch.zeros_like(rows[:1]))[0]
            return (self._layer(rows) - bias).t(), bias


@contextmanager
def projected(
    model: nn.Module,
    handle: Handle,
    *configs: MechanismConfig | None,
    text: Text | None = None,
    grid_thw: tuple[int, ...] = GRID,
) -> Iterator[None]:
    """Run a model's attention calls by the reference, with a config each; None is dense."""
    calls = [None if config is None else (config, text or Text()) for config in configs]
    with Projected(calls, model, handle, grid_thw) as mode:
        yield
    assert mode.count == len(calls)
