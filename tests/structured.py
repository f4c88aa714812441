"""A small video transformer whose heads are known to look along some axes only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

GRID = (8, 8, 8)
TILE = (2, 2, 2)
EVERYTHING = ""
_SHARPNESS = 40.0
_HEAD_DIM = 16
_FEATURES = 9


class StructuredAttention(nn.Module):
    """Attention whose heads see only the tiles that share their place on some axes.

    Args:
        axes: For each head the axes ("T", "H", "W") on which it stays in its own tile.
    """

    def __init__(self, axes: tuple[str, ...]) -> None:
        super().__init__()
        width = len(axes) * _HEAD_DIM
        self.heads = len(axes)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        places = [_place_features(each) for each in axes]
        for index, name in enumerate(("place_q", "place_k")):
            self.register_buffer(name, torch.stack([each[index] for each in places]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend; places replace the last channels of queries and keys."""
        q, k, v = (
            to(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (
            x * self.content_mask + place for x, place in ((q, self.place_q), (k, self.place_k))
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.to_out(out.transpose(1, 2).flatten(2))

    @property
    def content_mask(self) -> Tensor:
        """The channels that the content of a token is in."""
        return (torch.arange(_HEAD_DIM) < _HEAD_DIM - _FEATURES).float()


def _place_features(axes: str) -> tuple[Tensor, Tensor]:
    """Queries and keys [tokens, channels] whose product is minus the squared distance in tiles."""
    places = torch.cartesian_prod(
        *(torch.arange(side).float() // tile for side, tile in zip(GRID, TILE, strict=True))
    )
    q, k = torch.zeros(2, len(places), _HEAD_DIM)
    for number, axis in enumerate("THW"):
        if axis in axes:
            at, first = places[:, number], _HEAD_DIM - 3 * (number + 1)
            one = torch.ones_like(at)
            q[:, first : first + 3] = _SHARPNESS * torch.stack([2 * at, -one, -at.square()], 1)
            k[:, first : first + 3] = torch.stack([at, at.square(), one], 1)
    return q, k


class StructuredDiT(nn.Module):
    """A patch embedding and layers of structured attention.

    Args:
        layers: For each layer and head the axes on which the head stays in its own tile.
    """

    def __init__(self, layers: tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        width = len(layers[0]) * _HEAD_DIM
        self.patch = nn.Conv3d(2, width, 1)
        self.blocks = nn.ModuleList(StructuredAttention(axes) for axes in layers)
        self.head = nn.Linear(width, 2)

    def forward(self, video: Tensor) -> Tensor:
        """Return the prediction, [batch, tokens, 2]."""
        tokens = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block(F.layer_norm(tokens, tokens.shape[-1:]))
        output: Tensor = self.head(tokens)
        return output


def structured_model(layers: tuple[tuple[str, ...], ...], seed: int = 0) -> StructuredDiT:
    """Return a model with fixed weights, without gradients."""
    torch.manual_seed(seed)
    return StructuredDiT(layers).requires_grad_(False).eval()


def structured_video(seed: int = 0) -> Tensor:
    """Return a random video [1, 2, T, H, W]."""
    return torch.randn(1, 2, *GRID, generator=torch.Generator().manual_seed(seed))
