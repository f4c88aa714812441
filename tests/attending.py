"""Attention functions as tests of operators take them: inputs, gradients, and what is selected."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPS = torch.ops.compiled_sparse
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("grad_q", "grad_k", "grad_v", "grad_gate")
Inputs = list[Tensor]
Attend = Callable[..., tuple[Tensor, Tensor]]
Chosen = list[list[list[list[int]]]]
"""The key tiles, ascending, of every query tile of every head of every batch entry."""


class Selections(TorchDispatchMode):
    """Keeps the tiles that are selected while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Chosen] = []
        self.counts: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is OPS.top_k_blocks.default:
            indices, counts = result
            self.counts |= set(counts.flatten().tolist())
            width = max(self.counts)
            self.chosen.append(indices[..., :width].tolist())
        return result


def outcome(
    attend: Attend,
    inputs: Inputs,
    weights: tuple[Tensor, Tensor],
    names: Sequence[str] = NAMES,
) -> dict[str, Tensor]:
    """Output, log-sum-exp and every gradient, through both.

    Args:
        attend: Returns output and log-sum-exp.
        inputs: Its inputs; those that want a gradient get one.
        weights: What output and log-sum-exp are weighed with.
        names: What the gradients are called.
    """
    leaves = [each.detach().requires_grad_(each.requires_grad) for each in inputs]
    out, lse = attend(*leaves)
    results = {"out": out.detach(), "lse": lse.detach()}
    wanted = [each for each in leaves if each.requires_grad]
    outputs = out, lse.masked_fill(lse.isinf(), 0.0)
    grads = torch.autograd.grad(
        outputs, wanted, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    )
    found = [name for name, leaf in zip(names, leaves, strict=False) if leaf.requires_grad]
    return results | dict(zip(found, grads, strict=True))


def weights_for(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Random weights for output and log-sum-exp."""
    q = inputs[0]
    return torch.randn(q.shape).to(q.dtype), torch.randn(q.shape[:-1])


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same leaves in another dtype."""
    return [each.detach().to(dtype).requires_grad_(each.requires_grad) for each in inputs]


def over_blhd(x: Tensor) -> Tensor:
    """The same leaf over [batch, length, heads, head_dim] memory."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of what is expected."""
    return float((actual.double() - expected).norm() / expected.norm())


def assert_same_outcome(
    one: Attend, other: Attend, inputs: Inputs, names: Sequence[str] = NAMES
) -> None:
    """Check that two functions give the same values and gradients."""
    weights = weights_for(inputs)
    actual, expected = (outcome(each, inputs, weights, names) for each in (one, other))
    for name, each in actual.items():
        assert_same_sums(each, expected[name])


def assert_same_sums(actual: Tensor, expected: Tensor) -> None:
    """Check two results of sums in float32 whose orders differ: to 1e-5 of the largest."""
    largest = max(1.0, float(expected.detach().abs().nan_to_num(posinf=0.0).max()))
    torch.testing.assert_close(actual, expected, rtol=1.3e-6, atol=1e-5 * largest)
