"""Run an unmodified model eagerly with its video self-attention replaced by the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import Text
from compiled_sparse.reference.attention import attention


class override(TorchFunctionMode):  # noqa: N801 - used like a function: with override(...)
    """Replace every self-attention over a given layout by the dense masked reference.

    Calls to `scaled_dot_product_attention` whose queries and keys are both as long as the layout
    run `reference.attention`; all other calls are left alone, and so are those the compiler would
    leave dense: causal, with dropout, or with a mask that is not boolean key padding. For eager
    code: to see what a compiled sparse model should have computed.

    Args:
        config: The mechanism.
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
    """

    def __init__(
        self, config: MechanismConfig, *, grid_thw: tuple[int, ...], text: Text | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.grid_thw = grid_thw
        self.text = text or Text()
        self.num_replaced = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Intercept attention calls; see the class."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _bind(*args, **kwargs)
        if not self._applies(call):
            return func(*args, **kwargs)
        self.num_replaced += 1
        mask = call["attn_mask"]
        return attention(
            call["query"],
            call["key"],
            call["value"],
            self.config,
            grid_thw=self.grid_thw,
            text=self.text,
            key_mask=None if mask is None else mask[:, 0, 0].expand(call["key"].shape[0], -1),
            scale=call["scale"],
        )

    def _applies(self, call: dict[str, Any]) -> bool:
        query, key = call["query"], call["key"]
        length = torch.Size(self.grid_thw).numel() + self.text.before + self.text.after
        if query.dim() != 4 or not query.shape[2] == key.shape[2] == length:
            return False
        return not call["is_causal"] and not call["dropout_p"] and _is_padding(call["attn_mask"])


def _is_padding(mask: Tensor | None) -> bool:
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1)


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
