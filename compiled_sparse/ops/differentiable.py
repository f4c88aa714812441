"""Registering a kernel op of attention: implementations, fakes, and a backward that is an op, too.

The forward is `name(q, k, v, *tensors, *settings) -> (out, lse)`; the backward is
`name_backward(grad_out, grad_lse?, q, k, v, out, lse, *tensors, *settings)` and returns the
gradients of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import NoReturn

import torch
from torch import Tensor

from compiled_sparse.errors import DoubleBackwardError
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.tensors import empty_like_blhd

Outputs = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def define_attention(name: str, tensors: str, settings: str) -> None:
    """Define the schemas of an op and of its backward.

    Args:
        name: Name of the op inside the namespace.
        tensors: Schema of the tensors behind q, k and v.
        settings: Schema of what is no tensor.
    """
    rest = f"{tensors}, {settings}"
    tags = (torch.Tag.needs_exact_strides,)
    LIBRARY.define(
        f"{name}(Tensor q, Tensor k, Tensor v, {rest}) -> (Tensor out, Tensor lse)", tags=tags
    )
    LIBRARY.define(
        f"{name}_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
        f"Tensor out, Tensor lse, {rest}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
        tags=tags,
    )


def register_attention(
    name: str,
    *,
    num_tensors: int,
    forward: Callable[..., Outputs],
    backward: Callable[..., Gradients],
    fake: Callable[..., Outputs],
) -> None:
    """Register what an op that `define_attention` defined does, and its derivative.

    Args:
        name: Name of the op inside the namespace.
        num_tensors: How many tensors it takes behind q, k and v, None among them.
        forward: Its implementation on every device.
        backward: That of its backward.
        fake: What the forward returns, allocated only.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        num_leading = 3 + num_tensors
        q, k, v, *tensors = inputs[:num_leading]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.settings = inputs[num_leading:]

    def differentiate(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        unused = (None,) * (num_tensors + len(ctx.settings))
        if grad_out is None and grad_lse is None:
            return (None, None, None, *unused)
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        op = getattr(torch.ops.compiled_sparse, f"{name}_backward")
        return (*op(grad_out, grad_lse, *saved, *ctx.settings), *unused)

    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise DoubleBackwardError(
            f"{name} is differentiable only once",
            got="a second derivative",
            expected="first derivatives only",
            next_step="use cs.reference.attention where second derivatives are needed",
        )

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, forward, device)
        LIBRARY.impl(f"{name}_backward", backward, device)
    both = (f"{NAMESPACE}::{name}", f"{NAMESPACE}::{name}_backward")
    torch.library.register_fake(both[0], fake, lib=LIBRARY)
    torch.library.register_fake(both[1], _backward_fake, lib=LIBRARY)
    torch.library.register_autograd(
        both[0], differentiate, setup_context=setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(both[1], refuse, setup_context=_save_nothing, lib=LIBRARY)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Gradients:
    return empty_like_blhd(q), empty_like_blhd(k), empty_like_blhd(v)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The second derivative only raises, so nothing is kept for it."""
