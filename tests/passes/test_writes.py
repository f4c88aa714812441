"""Writes that a graph hardly shows: through numpy, in nested graphs, under another name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import Tiny
from modules import assert_rewritten
from modules import assert_untouched
from modules import raster
from modules import video
from torch import Tensor
from torch import fx

from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.writes import reached_by_writes
from compiled_sparse.passes.writes import shared_at_run_time

Operation = Callable[[Tensor], Tensor]
Write = Callable[[Tensor], Any]

BACKWARDS = np.arange(59, -1, -1)


def _after(write: Write) -> Tiny:
    """Return a model that attends to tokens after something was done to them."""

    def body(m: Tiny, x: Tensor) -> Tensor:
        tokens = raster(x).clone()
        write(tokens)
        return m.attn(tokens)

    return Tiny(body)


def _swap_halves(tokens: Tensor) -> None:
    array = np.asarray(tokens)
    array[:, :30], array[:, 30:] = array[:, 30:].copy(), array[:, :30].copy()


THROUGH_NUMPY: dict[str, Write] = {
    "items": lambda y: y.numpy().__setitem__(slice(None), np.flip(y.numpy(), 1).copy()),
    "sort": lambda y: y.numpy().sort(axis=1),
    "function": lambda y: np.put_along_axis(
        y.numpy(), BACKWARDS[None, :, None], y.numpy().copy(), 1
    ),
    "operator": lambda y: y.numpy().__imul__(np.sign(y.numpy())),
    "other view": _swap_halves,
}


@pytest.mark.parametrize("write", THROUGH_NUMPY.values(), ids=THROUGH_NUMPY)
def test_a_write_through_a_numpy_view_is_seen(write: Write) -> None:
    assert_untouched(_after(write).requires_grad_(False), video(), reason="layout_unknown")


class Reversing(torch.autograd.Function):
    """Writes to its input without marking it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Reverse the tokens in place."""
        x.copy_(x.flip(1))
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return some gradient."""
        return gradients[0].expand(1, 60, 16)


def test_a_write_inside_an_autograd_function_is_seen() -> None:
    assert_untouched(_after(Reversing.apply), video(), reason="layout_unknown")


@torch._dynamo.nonstrict_trace
def _reverse_untraced(tokens: Tensor) -> Tensor:
    tokens.copy_(tokens.flip(1))
    return tokens.sum()


def test_what_runs_untraced_may_write() -> None:
    model = _after(_reverse_untraced).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


def test_a_branch_that_writes_nothing_keeps_the_layout() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        tokens = raster(x).clone()
        changed = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 2, (tokens,))
        return m.attn(tokens) + changed.mean()

    assert_rewritten(Tiny(body).requires_grad_(False), video())


# Results that are their operand.

KEPT = {
    "dropout": lambda y: F.dropout(y, 0.1, training=False),
    "dropout of nothing": lambda y: F.dropout(y, 0.0),
    "dropout module": torch.nn.Dropout().eval(),
    "view of dropout": lambda y: F.dropout(y, 0.1, training=False).view_as(y),
    "dropout twice": lambda y: torch.dropout(torch.dropout(y, 0.1, False), 0.1, False),
    "dropout in a checkpoint": lambda y: torch.utils.checkpoint.checkpoint(
        lambda x: F.dropout(x, 0.1, training=False), y, use_reentrant=False
    ),
    "contiguous": lambda y: y.contiguous(),
    "to": lambda y: y.to(torch.float32),
    "reshape": lambda y: y.reshape(y.shape),
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("writes_result", [False, True])
def test_a_write_to_a_result_that_is_its_operand_is_seen(
    keep: Operation, writes_result: bool
) -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        tokens = raster(x).contiguous()
        kept = keep(tokens)
        written, read = (kept, tokens) if writes_result else (tokens, kept)
        written.copy_(read.flip(1))
        return m.attn(read)

    model = Tiny(body).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")


def test_dropout_that_nothing_is_written_through_keeps_the_layout() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        tokens = F.dropout(raster(x), 0.1, training=False)
        tokens += m.position
        return m.attn(tokens)

    assert_rewritten(Tiny(body).requires_grad_(False), video())


class Dropping(torch.autograd.Function):
    """Returns its input from a graph of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Drop nothing."""
        return F.dropout(x, 0.1, training=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient."""
        return gradients[0]


OPERATIONS: dict[str, Operation] = {
    "alpha dropout": lambda y: F.alpha_dropout(y, 0.1),
    "feature alpha dropout": lambda y: F.feature_alpha_dropout(y, 0.1),
    "dropout 1d": lambda y: F.dropout1d(y, 0.1, training=False),
    "dropout 2d": lambda y: F.dropout2d(y[None, None], 0.1, training=False),
    "dropout 3d": lambda y: F.dropout3d(y[None, None], 0.1, training=False),
    "feature dropout": lambda y: torch.feature_dropout(y, 0.1, False),
    "rrelu": lambda y: F.rrelu(y),
    "autograd function": Dropping.apply,
    "float": lambda y: y.float(),
    "type": lambda y: y.type(torch.float32),
    "type_as": lambda y: y.type_as(y),
    "cpu": lambda y: y.cpu(),
    "detach": lambda y: y.detach(),
    "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
    "positive": lambda y: +y,
    "real": lambda y: y.real,
    "conj": lambda y: y.conj(),
    "resolve_conj": lambda y: y.resolve_conj(),
    "as_tensor": lambda y: torch.as_tensor(y),
    "flatten of nothing": lambda y: y.flatten(1, 1),
    "ravel": lambda y: y.ravel(),
    "expand_as": lambda y: y.expand_as(y),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, y[0])[0],
    "atleast_1d": lambda y: torch.atleast_1d(y),
    "squeeze": lambda y: y.squeeze(),
    "split": lambda y: y.split(2)[1],
    "unsafe_split": lambda y: y.unsafe_split(2)[1],
    "view of another dtype": lambda y: y.view(torch.int32),
    "einsum": lambda y: torch.einsum("ij->ji", y),
    "cat of one": lambda y: torch.cat([y]),
    "pad of nothing": lambda y: F.pad(y, (0, 0)),
    "cropping pad": lambda y: F.pad(y, (-1, 0)),
    "pooling to the same size": lambda y: F.adaptive_avg_pool2d(y[None], (4, 6)),
    "sum_to_size": lambda y: y.sum_to_size(4, 6),
    "round of integers": lambda y: y.int().round(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_memory_shared_when_it_runs_is_known_to_be(operation: Operation, grad: bool) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, operation(y)

    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(4, 6, requires_grad=grad)
    y, result = torch.compile(both, backend=backend, fullgraph=True)(x)
    (graph,) = graphs
    operand = next(node for node in graph.graph.nodes if node.target is operator.mul)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    reached = reached_by_writes(storage_of(operand), shared_at_run_time(graph))
    if y.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
        assert storage_of(output.args[0][-1]) & reached
