"""The eager reference for models whose layers differ: which config each attention call has."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from builders.base import Grid
from builders.base import Truth
from torch import Tensor
from torch.overrides import TorchFunctionMode

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig


class Layered(TorchFunctionMode):
    """Run each call that the truth calls video by the reference, with its layer's own config.

    Args:
        truths: The truth about each attention call, in the order of execution.
        grid: The token grid.
        config_of: Config by layer index: the position among the calls that are video.
        step: Denoising step, for configs with a table.
    """

    def __init__(
        self,
        truths: Sequence[Truth],
        grid: Grid,
        config_of: Callable[[int], MechanismConfig],
        step: int | None = None,
    ) -> None:
        super().__init__()
        self._truths = truths
        self._grid = grid
        self._config_of = config_of
        self._step = step
        self._calls = 0
        self.layers = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the calls of video."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        truth = self._truths[self._calls]
        self._calls += 1
        if truth.kind != "video":
            return func(*args, **kwargs)
        layer = self.layers
        self.layers += 1
        return self._attend(truth, layer, *args, **kwargs)

    def _attend(
        self,
        truth: Truth,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        text = cs.Text(truth.before, truth.after)
        return cs.reference.attention(
            query,
            key,
            value,
            self._config_of(layer),
            grid_thw=self._grid,
            text=text,
            key_mask=_key_mask(attn_mask, key),
            scale=settings.get("scale"),
            step=self._step,
            layer=layer,
        )


def _key_mask(mask: Tensor | None, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = mask if mask.dtype.is_floating_point is False else mask == 0
    return mask[:, 0, 0].expand(key.shape[0], -1)
