"""Tiny modules with a patch embedding, and a backend that records what the pass did to them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import fx
from torch import nn

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.metadata import current_layout
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.passes.fx import nested_graphs
from compiled_sparse.passes.lowering import lower_einops
from compiled_sparse.policy import as_policy
from compiled_sparse.report import Decision

GRID = (3, 4, 5)
LENGTH = 60
POLICY = cs.STA(window_thw=(1, 1, 1), tile_thw=(2, 3, 2))
"""The narrowest window, so that one misplaced token changes the output."""

SPARSE_OP = torch.ops.compiled_sparse.sta.default
Body = Callable[..., Tensor]


class RecordingBackend:
    """Rewrite each graph, keep it as it was and as it became, and run it eagerly.

    Args:
        policy: As in `options={"policy": ...}`.
    """

    def __init__(self, policy: Any = POLICY) -> None:
        self.policy = as_policy(policy)
        self.before: list[fx.GraphModule] = []
        self.after: list[fx.GraphModule] = []
        self.decisions: list[Decision] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        self.before.append(clone_dynamo_graph(graph))
        rewritten = clone_dynamo_graph(graph)
        self.decisions += SparseAttentionPass(self.policy, current_layout())(rewritten)
        self.after.append(rewritten)
        return rewritten.forward

    @property
    def outcomes(self) -> list[str]:
        """The reason of each dense call, "sparse" for each other one."""
        return [decision.reason or decision.decision for decision in self.decisions]

    def count(self, graphs: list[fx.GraphModule], target: Any) -> int:
        """Return how many nodes of `graphs`, nested ones included, call `target`."""
        return sum(node.target is target for graph in graphs for node in all_nodes(graph))


def all_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes of a graph and of the graphs nested in it."""
    nested = [node for _, inner in nested_graphs(graph) for node in all_nodes(inner)]
    return [*graph.graph.nodes, *nested]


def op_lines(graph: fx.GraphModule) -> str:
    """Return the lines of a graph that call attention or read a size, without their types."""
    code = graph.print_readable(print_output=False)
    lines = [line.split(";")[0].strip() for line in code.splitlines()]
    calls = ("compiled_sparse", "attention(", "sym_size")
    kept = [s for s in lines if not s.startswith("#") and any(call in s for call in calls)]
    short = [re.sub(r"^(\w+): [^=]*=", r"\1 =", line) for line in kept]
    return "\n".join(textwrap.fill(line, 92, subsequent_indent="    ") for line in short)


class Attention(nn.Module):
    """Multi-head attention as diffusers writes it; queries and keys may come from other tokens."""

    def __init__(self, channels: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        edit: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; `edit` is applied to queries and keys as [batch, length, heads, head_dim]."""
        context = tokens if context is None else context
        q, k, v = (
            to(x).unflatten(2, (self.heads, -1))
            for to, x in ((self.to_q, tokens), (self.to_k, context), (self.to_v, context))
        )
        if edit is not None:
            q, k = edit(q), edit(k)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **kwargs
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """A patch embedding, one attention layer, and a body that connects them.

    Args:
        body: Called with this module, the embedded video [batch, channels, T, H, W] and the rest.
    """

    def __init__(self, body: Body, channels: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(2, channels, 1)
        self.attn = Attention(channels, heads)
        self.position = nn.Parameter(torch.randn(1, LENGTH, channels))
        self.registers = nn.Parameter(torch.randn(1, 4, channels))
        self.body = body

    def forward(self, video: Tensor, *rest: Any) -> Tensor:
        """Embed the video and hand it to the body."""
        return self.body(self, self.patch(video), *rest)


def raster(features: Tensor) -> Tensor:
    """Return [batch, T * H * W, channels] of an embedded video."""
    return features.flatten(2).transpose(1, 2)


def video(batch: int = 1, grid: tuple[int, ...] = GRID) -> Tensor:
    """Return a random video of 2 channels whose patches are single pixels."""
    return torch.randn(batch, 2, *grid)


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    """Return random tokens that are no video."""
    return torch.randn(batch, length, 16)


def record(
    model: Callable[..., Any],
    *inputs: Any,
    policy: Any = POLICY,
    dynamic: bool | None = False,
    fullgraph: bool = True,
    grid_thw: tuple[int, ...] | None = None,
) -> tuple[RecordingBackend, Any]:
    """Compile and run a model; return the backend and the output.

    Args:
        model: Module or function.
        *inputs: Its inputs.
        policy: What the backend is asked for.
        dynamic: As for `torch.compile`.
        fullgraph: As for `torch.compile`.
        grid_thw: Metadata for the call, if any.
    """
    torch._dynamo.reset()
    backend = RecordingBackend(policy)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    with nullcontext() if grid_thw is None else cs.metadata(grid_thw=grid_thw):
        return backend, compiled(*inputs)


def expected_output(
    model: Callable[..., Any],
    *inputs: Any,
    grid_thw: tuple[int, ...] = GRID,
    text: cs.Text | None = None,
    config: MechanismConfig = POLICY,
) -> Any:
    """Return what a model gives eagerly under the reference."""
    with cs.reference.override(config, grid_thw=grid_thw, text=text) as replaced:
        result = model(*inputs)
    assert replaced.num_replaced > 0
    return result


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Check the largest error against the largest expected value."""
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max()
    assert error <= relative * expected.abs().max(), f"error {error:.3e}"


def assert_rewritten(
    model: Callable[..., Any],
    *inputs: Any,
    grid_thw: tuple[int, ...] = GRID,
    text: cs.Text | None = None,
    calls: int = 1,
    **options: Any,
) -> RecordingBackend:
    """Check that all calls become sparse on one layout, and compute what the reference says."""
    backend, actual = record(model, *inputs, **options)
    assert backend.outcomes == ["sparse"] * calls, [str(d) for d in backend.decisions]
    assert {decision.grid_thw for decision in backend.decisions} == {grid_thw}
    assert_close(actual, expected_output(model, *inputs, grid_thw=grid_thw, text=text))
    dense = model(*inputs)
    assert (actual - dense).abs().max() > 1e-4 * dense.abs().max(), "the pattern hides nothing"
    return backend


def assert_untouched(
    model: Callable[..., Any], *inputs: Any, reason: str, calls: int = 1, **options: Any
) -> RecordingBackend:
    """Check that all calls stay dense for one reason, and the graph as it was."""
    backend, actual = record(model, *inputs, **options)
    assert backend.outcomes == [reason] * calls, backend.outcomes
    assert backend.count(backend.after, SPARSE_OP) == 0
    for graph in backend.before:
        for module in lower_einops(graph):
            module.recompile()
    assert [g.code for g in backend.before] == [g.code for g in backend.after]
    expected = model(*inputs)
    assert_close(actual, expected)
    return backend


class Block(nn.Module):
    """Self-attention with rotary embedding, cross-attention, feed-forward."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.attn1 = Attention(channels)
        self.attn2 = Attention(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, text: Tensor, step: Tensor, angles: Tensor) -> Tensor:
        """Return the block's output for tokens [batch, length, channels]."""
        normed = F.layer_norm(x, x.shape[-1:]) * (1 + step[:, None])
        x = x + self.attn1(normed, edit=lambda heads: rotate(heads, angles))
        x = x + self.attn2(x, text)
        return x + self.down(F.gelu(self.up(x)))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of [batch, length, heads, head_dim] by [length, head_dim]."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    cos, sin = angles.cos()[:, None].type_as(x), angles.sin()[:, None].type_as(x)
    return x * cos + turned * sin


class TinyDiT(nn.Module):
    """What a video transformer does, in small: called with a video, text tokens and a timestep.

    Args:
        blocks: Number of blocks.
        checkpoint: Recompute each block in the backward pass.
    """

    def __init__(self, blocks: int = 2, *, checkpoint: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv3d(2, 16, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(16, 8)
        self.checkpoint = checkpoint

    def forward(self, video: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """Return a video like the input's."""
        features = self.patch(video)
        batch, _, frames, height, width = features.shape
        x = raster(features)
        frequencies = torch.linspace(0.1, 1, 8, device=x.device)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        modulation = (step[:, None] * frequencies.repeat(2) / 10).sin().to(x.dtype)
        for block in self.blocks:
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(
                    block, x, text, modulation, angles, use_reentrant=False
                )
            else:
                x = block(x, text, modulation, angles)
        x = self.head(x).unflatten(1, (frames, height, width)).unflatten(-1, (2, 1, 2, 2))
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, 2, frames, 2 * height, 2 * width)


def dit_inputs(
    grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return video, text and timestep for `TinyDiT`."""
    frames, height, width = grid
    video = torch.randn(batch, 2, frames, 2 * height, 2 * width)
    return video, torch.randn(batch, 7, 16), torch.full((batch,), step)


def compile_sparse(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    """Compile by name as a user does, with the test's policy and the eager inner compiler."""
    options = {"policy": POLICY, "inner": "eager", **options}
    return torch.compile(
        model, backend="compiled_sparse", fullgraph=True, dynamic=dynamic, options=options
    )


def parameter_gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a fixed random projection of the output, by parameter."""
    torch.manual_seed(1)
    weights = torch.randn(output.shape).to(output.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((output * weights).sum(), parameters)
    return dict(zip(names, gradients, strict=True))


def assert_gradients_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5
) -> None:
    """Compare gradients by name, relative to the largest element of all."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).abs().max())
        assert error <= relative * largest, f"{name}: error {error:.3e}"
