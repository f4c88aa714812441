"""Attention modules to attach to: two streams, one, wrapped layers, and a model around one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modules import Attention
from torch import Tensor
from torch import nn
from torch.utils.checkpoint import checkpoint


class TwoStreams(Attention):
    """Joint attention of video and text that are projected apart."""

    def __init__(self) -> None:
        super().__init__()
        self.of_text = nn.Linear(16, 48)

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        video = (self.to_q(hidden), self.to_k(hidden), self.to_v(hidden))
        pairs = zip(self.of_text(text).chunk(3, -1), video, strict=True)
        joint = (torch.cat(pair, dim=1).unflatten(2, (2, 8)).transpose(1, 2) for pair in pairs)
        return self.to_out(F.scaled_dot_product_attention(*joint).transpose(1, 2).flatten(2))


class OneStream(Attention):
    """Joint attention that puts text and video together itself."""

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        return super().forward(torch.cat([hidden, text], dim=1))


class LowRank(nn.Module):
    """A linear layer with an adapter, as LoRA puts it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Add the adapter's share."""
        return self.base_layer(x) + self.up(self.down(self.dropout(x))) * 0.5


class Model(nn.Module):
    """A model of one attention module behind a linear layer, if wanted."""

    def __init__(
        self,
        attn: nn.Module,
        *,
        is_checkpointed: bool = False,
        use_reentrant: bool = False,
        first: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.first = first or nn.Identity()
        self.attn = attn
        self.is_checkpointed = is_checkpointed
        self.use_reentrant = use_reentrant

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call it."""
        hidden, *rest = inputs
        hidden = self.first(hidden)
        if self.is_checkpointed:
            return checkpoint(self.attn, hidden, *rest, use_reentrant=self.use_reentrant)
        return self.attn(hidden, *rest)
