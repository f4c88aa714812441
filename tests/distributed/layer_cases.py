"""A distributed attention layer on several processes, and the same attention on one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sharded import shard_of
from sharded import whole_of
from torch import Tensor
from torch import distributed
from torch.profiler import ProfilerActivity
from torch.profiler import profile

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.layers import DistributedAttention
from compiled_sparse.distributed.layers import Replicated

_COLLECTIVES = "_c10d_functional::"
_WAIT = "_c10d_functional::wait_tensor"


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """What to compute.

    Args:
        config: The mechanism.
        grid: Token grid of the whole video.
        text: Tokens of text on all ranks, behind the video.
        heads: Query heads.
        key_heads: Key heads; 0 for as many.
        gated: Whether there is a gate.
        head_dim: Size of a head.
        step: Denoising step.
        layer: Layer.
    """

    config: MechanismConfig
    grid: tuple[int, ...] = (4, 6, 5)
    text: int = 0
    heads: int = 4
    key_heads: int = 0
    gated: bool = False
    head_dim: int = 8
    step: int | None = None
    layer: int | None = None

    @property
    def num_video(self) -> int:
        """Tokens of the whole video."""
        return math.prod(self.grid)

    @property
    def around(self) -> cs.Text:
        """The text, as the rest of the package says it."""
        return cs.Text(after=self.text)

    def tensors(self) -> list[Tensor]:
        """Return q, k, v and the gate, float64 [batch, heads, video and text, head_dim]."""
        generator = torch.Generator().manual_seed(0)
        key_heads = self.key_heads or self.heads
        heads = (self.heads, key_heads, key_heads, *([self.heads] if self.gated else []))
        shapes = [(2, each, self.num_video + self.text, self.head_dim) for each in heads]
        tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
        for gate in tensors[3:]:
            gate[:, :, self.num_video :] = 0.0
        return tensors

    def weights(self, rank: int) -> Tensor:
        """Return what the loss of a rank weighs its outputs with, over the whole sequence."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.heads, self.num_video + self.text, self.head_dim)
        weights = torch.randn(shape, generator=generator).double()
        # Each rank has a loss of its own over the text.
        weights[:, :, self.num_video :] *= rank + 1
        return weights


Found = dict[str, Any]


def in_layers(cases: list[LayerCase], compiler: str | None = None) -> list[Found]:
    """Compute the cases on this rank: outputs, gradients, and the collectives forward."""
    return [_in_layer(case, compiler) for case in cases]


def _in_layer(case: LayerCase, compiler: str | None) -> Found:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    wholes = [*case.tensors(), case.weights(rank)]
    *local, weights = (shard_of(each, rank, size, case.around) for each in wholes)
    layer: Any = DistributedAttention(case.config, distributed.group.WORLD, grid_thw=case.grid)
    run, real = layer.rows, min(layer.rows, max(0, case.num_video - rank * layer.rows))
    for each in local:
        each[:, :, real:run] = float("nan")  # nobody may read the padding
    leaves = [each.transpose(1, 2).contiguous().requires_grad_() for each in local]
    videos = [each[:, :run] for each in leaves]
    texts = [each[:, run:] for each in leaves]
    further: dict[str, Any] = {"step": case.step, "layer": case.layer}
    if case.text:
        further["replicated"] = Replicated(*texts[:3])
    if case.gated:
        further["gate_compress"] = videos[3]
    if compiler is not None:
        torch._dynamo.reset()
        layer = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=False)
        layer(*videos[:3], **further)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        video, text = layer(*videos[:3], **further)
    out = video if text is None else torch.cat([video, text], 1)
    grads = torch.autograd.grad(out, leaves, weights.transpose(1, 2))
    names = [each.key for each in recorded.key_averages() for _ in range(each.count)]
    return {
        "collectives": [n for n in names if n.startswith(_COLLECTIVES) and n != _WAIT],
        "text": text is not None,
        "out": out.detach().transpose(1, 2),
        "grads": [each.transpose(1, 2) for each in grads],
    }


def on_one(case: LayerCase, size: int) -> tuple[Tensor, list[Tensor]]:
    """Return output and gradients of the whole, by `cs.attention`, for the sum of all losses."""
    leaves = [each.requires_grad_() for each in case.tensors()]
    out = cs.attention(
        *leaves[:3],
        case.config,
        grid_thw=case.grid,
        text=case.around if case.text else None,
        gate=leaves[3] if case.gated else None,
        step=case.step,
        layer=case.layer,
    )
    weights = case.weights(0)
    weights[:, :, case.num_video :] *= size * (size + 1) / 2
    return out.detach(), list(torch.autograd.grad(out, leaves, weights))


def assert_as_on_one(case: LayerCase, ranks: list[Found]) -> None:
    """Check outputs, zeros at the padding, gradients and what was exchanged."""
    size = len(ranks)
    expected, gradients = on_one(case, size)
    for rank, found in enumerate(ranks):
        assert found["collectives"] == ["_c10d_functional::all_to_all_single"] * 2, case
        assert found["text"] == (case.text > 0)
        mine = shard_of(expected, rank, size, case.around)
        torch.testing.assert_close(found["out"], mine, msg=lambda said: f"{case}: {said}")
    for index, gradient in enumerate(gradients):
        given = whole_of([each["grads"][index] for each in ranks], case.num_video, case.around)
        if index == 3:  # the text's gate is no input
            given, gradient = (each[:, :, : case.num_video] for each in (given, gradient))
        torch.testing.assert_close(given, gradient, msg=lambda said: f"{case}: {said}")
