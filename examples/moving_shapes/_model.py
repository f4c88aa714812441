"""A small video diffusion transformer in plain PyTorch. It knows nothing of compiled_sparse."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

PATCH = (1, 2, 2)


class SelfAttention(nn.Module):
    """Attention among all tokens of the video, with rotary positions.

    Args:
        dim: Channels of a token.
        heads: Number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim // heads)
        self.norm_k = nn.RMSNorm(dim // heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the attention's output [batch, length, dim].

        Args:
            x: Tokens [batch, length, dim].
            cos: Cosines of the positions' angles [length, head_dim / 2].
            sin: Their sines.
        """
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q = _rotated(self.norm_q(q), cos, sin)
        k = _rotated(self.norm_k(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, both shifted, scaled and gated by the time of the diffusion.

    Args:
        dim: Channels of a token.
        heads: Number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.modulation = _zeroed(nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the tokens after the block [batch, length, dim].

        Args:
            x: Tokens [batch, length, dim].
            time: Embedding of the diffusion's time [batch, dim].
            cos: Cosines of the positions' angles [length, head_dim / 2].
            sin: Their sines.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class VideoDiT(nn.Module):
    """A diffusion transformer that continues a video from its clean first frame.

    Args:
        channels: Channels of the video; one more says which frames are given.
        grid_thw: Tokens per axis.
        dim: Channels of a token.
        heads: Number of heads.
        depth: Number of blocks.
    """

    def __init__(
        self,
        channels: int,
        grid_thw: tuple[int, int, int],
        dim: int = 64,
        heads: int = 2,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv3d(channels + 1, dim, PATCH, PATCH)
        self.places = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(dim, *(n if i == axis else 1 for i in range(3))))
            for axis, n in enumerate(grid_thw)
        )
        self.time_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation_out = _zeroed(nn.Linear(dim, 2 * dim))
        self.unpatch = _zeroed(nn.ConvTranspose3d(dim, channels, PATCH, PATCH))
        angles = _angles(grid_thw, dim // heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """Return the velocity [batch, channels, frames, height, width].

        Args:
            video: The noisy video, and 1 where it is given [batch, channels + 1, frames, ...].
            time: From 0, no noise, to 1, noise alone [batch].
        """
        x = self.patch_embed(video)
        for place in self.places:
            x = x + place
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        embedded = F.silu(self.time_embed(_waves(time, x.shape[-1])))
        for block in self.blocks:
            x = block(x, embedded, self.cos, self.sin)
        shift, scale = self.modulation_out(embedded)[:, None].chunk(2, -1)
        x = self.norm_out(x) * (1 + scale) + shift
        return self.unpatch(x.transpose(1, 2).unflatten(2, grid))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


def _angles(grid_thw: tuple[int, int, int], head_dim: int) -> Tensor:
    """Return rotary angles [length, head_dim / 2]: a quarter for time, the rest for the plane."""
    half = head_dim // 2
    plane = 3 * half // 8
    places = torch.meshgrid(*(torch.arange(n) for n in grid_thw), indexing="ij")
    parts = [
        place.flatten()[:, None] * 30.0 ** -torch.linspace(0, 1, count)
        for place, count in zip(places, (half - 2 * plane, plane, plane), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _waves(time: Tensor, dim: int) -> Tensor:
    rates = torch.exp(torch.linspace(0, math.log(1000), dim // 2, device=time.device))
    return torch.cat([(time[:, None] * rates).cos(), (time[:, None] * rates).sin()], dim=1)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
