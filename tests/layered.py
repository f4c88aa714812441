"""The eager reference for models whose attention calls have a config each."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from modules import GRID
from torch import Tensor
from torch.overrides import TorchFunctionMode

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import Text

Call = tuple[MechanismConfig, Text]


class Layered(TorchFunctionMode):
    """Run the i-th attention call by the reference, with the i-th config and text.

    Args:
        calls: Config and text of each call in the order of execution; None leaves it as it is.
        grid: The token grid.
    """

    def __init__(self, calls: Sequence[Call | None], grid: tuple[int, ...]) -> None:
        super().__init__()
        self.calls = calls
        self.grid = grid
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the calls."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.count += 1
        call = self.calls[self.count - 1]
        return func(*args, **kwargs) if call is None else self._attend(call, *args, **kwargs)

    def _attend(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        config, text = call
        assert not settings.get("is_causal")
        assert not settings.get("dropout_p")
        key_mask = None
        if attn_mask is not None:
            visible = attn_mask if attn_mask.dtype.is_floating_point is False else attn_mask == 0
            key_mask = visible[:, 0, 0].expand(key.shape[0], -1)
        return cs.reference.attention(
            query,
            key,
            value,
            config,
            grid_thw=self.grid,
            text=text,
            key_mask=key_mask,
            scale=settings.get("scale"),
            gate=self.gate(query, text),
            proj=self.projection(config),
        )

    def gate(self, query: Tensor, text: Text) -> Tensor | None:
        """Return what weighs the compressed branch of a call; nothing here."""
        return None

    def projection(self, config: MechanismConfig) -> tuple[Tensor, Tensor | None] | None:
        """Return what is behind the linear branch of a call; nothing here."""
        return None


def layered_output(
    model: Callable[..., Any],
    *inputs: Any,
    configs: Sequence[MechanismConfig | None],
    grid_thw: tuple[int, ...] = GRID,
) -> Any:
    """Return what a `TinyDiT` gives whose i-th self-attention has the i-th config; None is dense.

    Its blocks call self-attention and cross-attention in turn.
    """
    calls = [c for config in configs for c in (None if config is None else (config, Text()), None)]
    with Layered(calls, grid_thw) as mode:
        output = model(*inputs)
    assert mode.count == len(calls)
    return output
