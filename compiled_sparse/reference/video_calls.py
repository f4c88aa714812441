"""Eager code with something else done at its attention calls over a video."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compiled_sparse.layout import Text

Padding = tuple[Tensor | None, Tensor | None]

_HIDING_BIAS = -9000.0


class VideoCalls(TorchFunctionMode, ABC):
    """Do something else at every self-attention call over a given layout, in eager code.

    These are the calls to `scaled_dot_product_attention` whose queries and keys are both as long as
    the layout. All others are left alone, and so are those the compiler would leave dense: causal,
    with dropout, or with a mask that is not key padding. A mask is judged by its content: boolean,
    or of 0 and one number below -9000; the same for every head; and either the same for every
    query, or an outer product of valid queries and valid keys.

    Args:
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
    """

    def __init__(self, *, grid_thw: tuple[int, ...], text: Text | None = None) -> None:
        super().__init__()
        self.grid_thw = grid_thw
        self.text = text or Text()
        self.num_replaced = 0

    @abstractmethod
    def replace(
        self, call: dict[str, Any], keys: Tensor | None, queries: Tensor | None, layer: int
    ) -> Tensor:
        """Return the output of a call.

        Args:
            call: Its arguments by name.
            keys: Valid keys [batch, length], None for all.
            queries: Valid queries likewise.
            layer: How many of these calls came before.
        """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Intercept attention calls; see the class."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _bind(*args, **kwargs)
        mask = self._padding(call)
        if mask is None:
            return func(*args, **kwargs)
        layer = self.num_replaced
        self.num_replaced += 1
        return self.replace(call, *mask, layer)

    def _padding(self, call: dict[str, Any]) -> Padding | None:
        """Valid keys and queries of a call that is replaced; None for one that is left alone."""
        query, key = call["query"], call["key"]
        length = torch.Size(self.grid_thw).numel() + self.text.before + self.text.after
        if query.dim() != 4 or not query.shape[2] == key.shape[2] == length:
            return None
        if call["is_causal"] or call["dropout_p"]:
            return None
        mask = call["attn_mask"]
        return (None, None) if mask is None else _find_padding(mask, query.shape[0], length)


def _find_padding(mask: Tensor, batch: int, length: int) -> Padding | None:
    """Factor a mask into valid keys [batch, length] and valid queries, if that is what it is."""
    visible = mask
    if mask.dtype != torch.bool:
        visible = mask == 0
        hiding = mask[~visible].unique()
        if len(hiding) > 1 or bool((hiding > _HIDING_BIAS).any()):
            return None
    visible = visible.expand(*visible.shape[:-2], length, length)
    visible = visible[(None,) * (4 - visible.dim())]
    if not bool((visible == visible[:, :1]).all()):
        return None
    plane = visible[:, 0].expand(batch, -1, -1)
    if mask.dtype != torch.bool and not bool((mask == float("-inf")).any()):
        # A finite bias on every key is none at all.
        plane = plane | ~plane.any(-1, keepdim=True)
    keys, queries = plane.any(-2), plane.any(-1)
    per_key = bool((plane == keys[:, None]).all())
    if not per_key and not bool((plane == keys[:, None] & queries[:, :, None]).all()):
        return None
    return keys, None if per_key else queries


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    return dict(locals())
