"""A video transformer like Wan's in plain torch, compiled with this backend, beside eager."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from compiled_sparse.backend import compiled_sparse_backend

LAYERS, HEADS, CHANNELS, TEXT_TOKENS, TEXT_DIM = 2, 3, 4, 24, 32
CONFIG = cs.STA(window_thw=(1, 3, 3), tile_thw=(4, 4, 4))
KERNELS = ("block_sparse_attention", "block_sparse_attention_backward")
QUERY_SCALE = 3.0
"""At its initial scale attention is nearly a mean over keys, and a wrong mask would not show."""


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the checks of this section by name."""
    device = torch.device(settings.device)
    if settings.quick:
        check = functools.partial(_check, torch.float32, 24, (3, 9, 8), "aot_eager", device)
        return {"float32 D24": check}
    return {
        f"{str(dtype).removeprefix('torch.')} D{head_dim}": functools.partial(
            _check, dtype, head_dim, (5, 13, 15), "inductor", device
        )
        for dtype, head_dim in (
            (torch.bfloat16, 128),
            (torch.float32, 64),
            (torch.float16, 64),
        )
    }


class RotaryTable(nn.Module):
    """Cosines and sines of positions on a (T, H, W) grid, [1, tokens, 1, head_dim / 2]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        pairs = head_dim // 2
        of_height = pairs // 3
        self.pairs = (pairs - 2 * of_height, of_height, of_height)

    def forward(self, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the table of a grid."""
        angles = []
        for axis, (extent, pairs) in enumerate(zip(grid, self.pairs, strict=True)):
            exponents = torch.arange(pairs, device=device, dtype=torch.float64) / pairs
            positions = torch.arange(extent, device=device, dtype=torch.float64)
            angle = positions[:, None] * 10000.0**-exponents
            shape = [extent if i == axis else 1 for i in range(len(grid))]
            angles.append(angle.view(*shape, pairs).expand(*grid, pairs))
        table = torch.cat(angles, dim=-1).flatten(0, -2)[None, :, None]
        return table.cos().float(), table.sin().float()


class Attention(nn.Module):
    """Multi-head attention with RMS norms of queries and keys over all heads."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width, width)
        self.to_v = nn.Linear(context_width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-6)
        self.norm_k = nn.RMSNorm(width, eps=1e-6)
        self.to_out = nn.Linear(width, width)
        nn.init.constant_(self.norm_q.weight, QUERY_SCALE)

    def forward(
        self, tokens: Tensor, context: Tensor, table: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Attend from tokens to context."""
        q, k, v = (
            self.norm_q(self.to_q(tokens)),
            self.norm_k(self.to_k(context)),
            self.to_v(context),
        )
        q, k, v = (each.unflatten(2, (self.heads, -1)) for each in (q, k, v))
        if table is not None:
            q, k = _rotate(q, *table), _rotate(k, *table)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of [batch, tokens, heads, head_dim]."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, modulated by the time step."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, TEXT_DIM, heads)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, width) * width**-0.5)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, table: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the tokens after this block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)
        tokens = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attn1(tokens, tokens, table) * gate1
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ffn(self.norm3(x) * (1 + scale2) + shift2) * gate2


class VideoTransformer(nn.Module):
    """Patch embedding, blocks, projection back to patches."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.patch = nn.Conv3d(CHANNELS, width, (1, 2, 2), stride=(1, 2, 2))
        self.table = RotaryTable(head_dim)
        self.time = nn.Linear(16, 6 * width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(LAYERS)])
        self.head = nn.Linear(width, 4 * CHANNELS)

    def forward(self, video: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """Return [batch, tokens, channels of a patch]."""
        features = self.patch(video)
        table = self.table(tuple(features.shape[2:]), features.device)
        tokens = features.flatten(2).transpose(1, 2)
        modulation = self.time(time).unflatten(1, (6, -1))
        for block in self.blocks:
            tokens = block(tokens, text, modulation, table)
        return self.head(tokens)


def _check(
    dtype: torch.dtype,
    head_dim: int,
    grid: tuple[int, int, int],
    inner: str,
    device: torch.device,
) -> dict[str, Any]:
    """Compile, run forward and backward, and compare with the eager reference."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VideoTransformer(HEADS, head_dim).to(device, dtype)
    frames, height, width = grid
    inputs = (
        torch.randn(2, CHANNELS, frames, 2 * height, 2 * width, device=device, dtype=dtype),
        torch.randn(2, TEXT_TOKENS, TEXT_DIM, device=device, dtype=dtype),
        torch.randn(2, 16, device=device, dtype=dtype),
    )
    report = cs.explain(model, *inputs, policy=CONFIG)
    assert report.num_sparse == LAYERS, f"not every self-attention is sparse: {report.summary()}"
    assert report.num_graphs == 1, f"{report.num_graphs} graphs"
    torch._dynamo.reset()
    options = {"policy": CONFIG, "strict": True, "inner": inner}
    compiled = torch.compile(
        model, backend=compiled_sparse_backend, options=options, fullgraph=True
    )
    results = _results(model, compiled, inputs)
    calls = _kernel_calls(model, compiled, inputs)
    assert calls == dict.fromkeys(KERNELS, LAYERS), f"kernel calls of one step: {calls}"
    with cs.reference.override(CONFIG, grid_thw=grid):
        plain = _results(model, model, inputs)
        model.double()
        truth = _results(model, model, tuple(each.double() for each in inputs))
    return {"kernel_calls": calls, "errors": _check_model_errors(results, truth, plain)}


def _results(model: nn.Module, forward: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the output of a forward, and the gradients of all parameters."""
    out = forward(*inputs)
    generator = torch.Generator().manual_seed(1)
    # Rounded so that it is the same number in every precision.
    weight = torch.randn(out.shape, generator=generator).bfloat16().to(out.device)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, parameters, weight.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def _kernel_calls(model: nn.Module, forward: Any, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Count the calls of the kernel ops in one step, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _results(model, forward, inputs)
    names = [event.name for event in profile.events()]
    return {name: names.count(f"compiled_sparse::{name}") for name in KERNELS}


def _check_model_errors(
    results: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor]
) -> dict[str, float]:
    """Check relative errors against twice those of the eager reference in the same precision.

    The output is judged by itself, the gradients of all parameters together, as the mean square of
    their relative errors: a wrong one among them has an error of 1.
    """
    relative = {
        name: [
            float((each[name].double() - true).norm() / true.norm().clamp_min(1e-30))
            for each in (results, plain)
        ]
        for name, true in truth.items()
    }
    bad = [name for name, (error, _) in relative.items() if not error < 1]
    assert not bad, f"not finite or wholly wrong: {', '.join(bad)}"
    out_error, out_plain = relative.pop("out")
    squares = zip(*([error**2 for error in pair] for pair in relative.values()), strict=True)
    gradients, gradients_plain = ((sum(each) / len(relative)) ** 0.5 for each in squares)
    errors = {
        "out": out_error,
        "out_plain": out_plain,
        "gradients": gradients,
        "gradients_plain": gradients_plain,
    }
    worst = max(relative, key=lambda name: relative[name][0] - 2 * relative[name][1])
    assert out_error <= 2 * out_plain, f"output: {errors}"
    assert gradients <= 2 * gradients_plain, f"gradients: {errors}, {worst}: {relative[worst]}"
    return errors
