"""The eager reference for attached models with learned gates."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from layered import Call
from layered import Layered
from modules import GRID
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.attach import Handle
from compiled_sparse.layout import Text

GATE = "to_gate_compress"
CONFIG = cs.VSA(sparsity=0.6, tile_thw=(2, 3, 2), gate=GATE)
_PROJECTIONS = ("to_q", "to_qkv", "qkv", "to_qkv_mlp_proj")


class Gated(Layered):
    """Run attention calls by the reference, gated by what their queries are projected from.

    Args:
        calls: Config and text of each call in the order of execution; None leaves it as it is.
        model: An attached model that is run eagerly inside.
        gates: Paths of its gates.
        grid: The token grid.
    """

    def __init__(
        self,
        calls: Sequence[Call | None],
        model: nn.Module,
        gates: Sequence[str],
        grid: tuple[int, ...] = GRID,
    ) -> None:
        super().__init__(calls, grid)
        self._latest: tuple[Tensor, nn.Module] | None = None
        self._hooks: list[Any] = []
        for path in gates:
            parent, _, name = path.rpartition(".")
            attention = model.get_submodule(parent)
            gate = attention.get_submodule(name)
            found = [getattr(attention, each, None) for each in _PROJECTIONS]
            projection = next(each for each in found if each is not None)
            self._hooks.append(projection.register_forward_pre_hook(self._remember(gate)))

    def _remember(self, gate: nn.Module) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._latest = (args[0], gate)

        return hook

    def gate(self, query: Tensor, text: Text) -> Tensor | None:
        """Compute the gate as the models that have one do."""
        assert self._latest is not None
        hidden, gate = self._latest
        value = gate(hidden).unflatten(-1, (query.shape[1], query.shape[3])).transpose(1, 2)
        is_whole = value.shape[2] == query.shape[2]
        return value if is_whole else F.pad(value, (0, 0, text.before, text.after))

    def __exit__(self, *exception: Any) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)


@contextmanager
def gated(
    model: nn.Module,
    handle: Handle,
    *texts: Text | None,
    config: cs.VSA = CONFIG,
    grid_thw: tuple[int, ...] = GRID,
) -> Iterator[None]:
    """Run a model's attention calls by the reference, one for each text given; None is dense."""
    plain = cs.VSA(sparsity=config.sparsity, tile_thw=config.tile_thw)
    calls = [None if text is None else (plain, text) for text in texts]
    with Gated(calls, model, handle.gates, grid_thw) as mode:
        yield
    assert mode.count == len(texts)


def open_gates(model: nn.Module, gates: Sequence[str], scale: float = 0.3) -> None:
    """Give gates, which are zero at first, values of their own."""
    for index, path in enumerate(gates):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in model.get_submodule(path).parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
