"""Tiny modules with a patch embedding, and a backend that records what the pass did to them."""

from __future__ import annotations

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
from compiled_sparse.metadata import current_layout
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.passes.fx import nested_graphs
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
    """Return the lines of a rewritten graph that hold this package's ops or attention calls."""
    code = graph.print_readable(print_output=False, include_stride=True)
    lines = [line.split(";")[0].strip() for line in code.splitlines()]
    return "\n".join(s for s in lines if "compiled_sparse" in s or "attention(" in s)


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
    config: cs.STA = POLICY,
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
    assert [g.code for g in backend.before] == [g.code for g in backend.after]
    expected = model(*inputs)
    assert_close(actual, expected)
    return backend
