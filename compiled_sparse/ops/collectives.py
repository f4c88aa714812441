"""All-to-all with a gradient, as functional collectives that compilers can see and reorder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """Exchange runs of a flat tensor among the processes of a group.

    Its gradient is the exchange backwards. Method: `torch.distributed.all_to_all_single`.

    Args:
        x: 1-D, contiguous: first what goes to the first process, and so on.
        received: How many elements come from each process.
        sent: How many go to each.
        group: The process group's name.

    Returns:
        1-D, what came from each process, in their order.
    """
    result: Tensor = _AllToAll.apply(x, list(received), list(sent), group)  # type: ignore[no-untyped-call]
    return result


class _AllToAll(torch.autograd.Function):
    """An exchange whose gradient goes back the way it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.way_back = (sent, received, group)
        ops = torch.ops._c10d_functional
        moved: Tensor = ops.wait_tensor(ops.all_to_all_single(x, received, sent, group))
        return moved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return all_to_all(grad.contiguous(), *ctx.way_back), None, None, None
