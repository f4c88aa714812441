"""Inputs, block lists and the tolerance rule shared by the tests of operators."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence

import oracle
import torch
from torch import Tensor

GARBAGE = 1_000_000
"""Fills the unused tail of a block list: reading it would be an error."""

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def assert_error_within_budget(name: str, actual: Tensor, exact: Tensor, *plain: Tensor) -> None:
    """Check a result against float64 with a tolerance taken from data.

    The root mean square of the error may be twice that of the worst plain implementation. Each
    element may be off by twice the largest error of a plain one, plus a rounding of its value to
    the result's dtype, plus a rounding of float32 arithmetic on the tensor's largest value.

    Args:
        name: What the tensor is, for the message.
        actual: Result under test.
        exact: The same in float64.
        *plain: The same from plain dense implementations in the same precision.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    infinite = exact.isinf()
    assert torch.equal(actual.double()[infinite], exact[infinite]), f"{name}: infinities differ"
    assert not actual.isnan().any(), f"{name}: NaN at {_first(actual.isnan())}"
    value = exact.masked_fill(infinite, 0.0)

    def error_of(result: Tensor) -> Tensor:
        return (result.double().masked_fill(infinite, 0.0) - value).abs()

    error, plain_errors = error_of(actual), [error_of(each) for each in plain]
    rounding = torch.finfo(actual.dtype).eps / 2 * value.abs()
    arithmetic = torch.finfo(torch.float32).eps * value.abs().max()
    plain_max = max(each.max() for each in plain_errors)
    budget = 2 * plain_max + rounding + arithmetic
    if (error > budget).any():
        worst = _first((error - budget) == (error - budget).max())
        raise AssertionError(
            f"{name}: error {error[worst]:.3e} at {worst} exceeds its budget {budget[worst]:.3e} "
            f"(largest error of plain implementations {plain_max:.3e}, of this {error.max():.3e})"
        )
    rms, plain_rms = _rms(error), max(_rms(each) for each in plain_errors)
    budget_rms = 2 * plain_rms + _rms(rounding)
    assert rms <= budget_rms, (
        f"{name}: root mean square error {rms:.3e} exceeds its budget {budget_rms:.3e} "
        f"(of plain implementations {plain_rms:.3e}; max error {error.max():.3e} at "
        f"{_first(error == error.max())})"
    )


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in where.nonzero()[0])


def assert_matches_oracle(
    implementation: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    gradients: bool = True,
    rounded: bool = False,
) -> None:
    """Check output, log-sum-exp and all gradients of an implementation against float64.

    Args:
        implementation: Returns output and log-sum-exp from q, k and v.
        q: Queries.
        k: Keys.
        v: Values.
        mask: Which keys each query sees.
        key_mask: Key padding, True where attended.
        scale: Softmax scale.
        gradients: Whether to differentiate, through both outputs.
        rounded: Whether operands of products are rounded to the inputs' dtype, as on GPUs.
    """

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return oracle.attention(q, k, v, mask, key_mask, scale)

    weights = torch.randn(q.shape).to(q.dtype), torch.randn(q.shape[:-1])
    actual = _outputs_and_gradients(implementation, (q, k, v), weights, gradients)
    exact = _outputs_and_gradients(dense, _cast(torch.float64, q, k, v), weights, gradients)
    plain = [
        textbook((q, k, v), weights, mask, key_mask, scale, (factor_on, base, rounded))
        for factor_on in ("queries", "keys", "scores")
        for base in (math.e, 2.0)
    ]
    for name, result in actual.items():
        assert_error_within_budget(name, result, exact[name], *(each[name] for each in plain))


def textbook(
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, Tensor],
    mask: Tensor,
    key_mask: Tensor | None,
    scale: float | None,
    rounding: tuple[str, float, bool],
) -> dict[str, Tensor]:
    """Plain attention, and its gradients from the saved output and log-sum-exp alone.

    The arithmetic is float32, as promised for every low precision; on request operands of products
    are rounded. One implementation may round luckily: a few that differ in what they multiply by
    the scale, and in the base of their exponentials, show how large errors get.
    """
    mask = mask if key_mask is None else mask & key_mask[:, None, None]
    dtype = inputs[0].dtype
    q, k, v = (each.float() for each in inputs)
    shape = (*k.shape[:2], q.shape[1] // k.shape[1], *k.shape[2:])
    k, v = (each[:, :, None].expand(shape).flatten(1, 2) for each in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    factor_on, base, rounded = rounding

    def operand(values: Tensor) -> Tensor:
        return values.to(dtype).float() if rounded else values

    factors = dict.fromkeys(("queries", "keys", "scores"), 1.0)
    factors[factor_on] = scale / math.log(base)
    scores = (q * factors["queries"]) @ (k * factors["keys"]).mT * factors["scores"]
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).min)
    total = (base ** (scores - top)).sum(-1, keepdim=True)
    lse = (top + total.log() / math.log(base)) * math.log(base)
    lse = lse.masked_fill(total == 0, float("-inf"))
    p = base ** (scores - lse.masked_fill(total == 0, 0.0) / math.log(base))
    lse = lse[..., 0]
    out = (operand(p) @ v).to(dtype).float()
    grad_out, grad_lse = weights
    grad_out = grad_out.float()
    delta = (grad_out * out).sum(-1) - grad_lse.masked_fill(lse.isinf(), 0.0)
    grad_scores = p * (grad_out @ v.mT - delta[..., None])
    return {
        "out": out.to(dtype),
        "lse": lse,
        "grad_q": (operand(grad_scores) @ (k * scale)).to(dtype),
        "grad_k": (operand(grad_scores).mT @ (q * scale)).view(shape).sum(2).to(dtype),
        "grad_v": (operand(p).mT @ grad_out).view(shape).sum(2).to(dtype),
    }


def _cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().to(dtype) for tensor in tensors)


def _outputs_and_gradients(
    implementation: Attention,
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, Tensor],
    gradients: bool,
) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_(gradients) for tensor in inputs]
    out, lse = implementation(*leaves)
    results = {"out": out.detach(), "lse": lse.detach()}
    if not gradients:
        return results
    # A query without a key has log-sum-exp -inf, which nothing can be weighed with.
    finite = lse.masked_fill(lse.isinf(), 0.0)
    outputs = (out, finite)
    grad_outputs = [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    names = ("grad_q", "grad_k", "grad_v")
    return results | dict(
        zip(names, torch.autograd.grad(outputs, leaves, grad_outputs), strict=True)
    )


def random_lists(
    shape: tuple[int, int], rows: int, num_blocks: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ragged lists [*shape, rows, K], counts from 0 to all, garbage behind each row."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, num_blocks + 1, (*shape, rows), generator=generator)
    counts[..., 0] = 0
    counts[..., -1] = num_blocks
    order = torch.rand(*shape, rows, num_blocks, generator=generator).argsort(dim=-1)
    used = torch.arange(num_blocks) < counts[..., None]
    return order.masked_fill(~used, GARBAGE).int(), counts.int()


def full_lists(rows: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return lists in which every query block sees every key block."""
    indices = torch.arange(num_blocks).expand(1, 1, rows, -1).int()
    return indices, torch.full((1, 1, rows), num_blocks).int()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The arguments of the kernel op that say where blocks lie, and what follows from them."""

    grid: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    text_before: int = 0
    text_after: int = 0
    key_length: int | None = None

    @property
    def q_blocks(self) -> list[list[int]]:
        """Tokens of every query block."""
        return oracle.blocks(self.grid, self.q_tile, self.text_before, self.text_after)

    @property
    def kv_blocks(self) -> list[list[int]]:
        """Tokens of every key block."""
        grid: Sequence[int] = self.grid
        if self.key_length is not None:
            grid = (self.key_length - self.text_before - self.text_after,)
        return oracle.blocks(grid, self.kv_tile, self.text_before, self.text_after)

    def lists(self, batch: int = 1, heads: int = 1) -> tuple[Tensor, Tensor]:
        """Return random ragged lists."""
        return random_lists((batch, heads), len(self.q_blocks), len(self.kv_blocks))

    def tensors(
        self,
        batch: int = 2,
        heads: int = 3,
        kv_heads: int | None = None,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return random q, k and v."""
        q_length, k_length = (
            sum(len(block) for block in each) for each in (self.q_blocks, self.kv_blocks)
        )
        k_shape = (batch, kv_heads or heads, k_length, head_dim)
        q = torch.randn(batch, heads, q_length, head_dim).to(dtype)
        return q, torch.randn(k_shape).to(dtype), torch.randn(k_shape).to(dtype)

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments of `cs.ops.block_sparse_attention`."""
        names = ("grid", "q_tile", "kv_tile", "text_before", "text_after")
        return {name: getattr(self, name) for name in names}

    def positional(self) -> tuple[object, ...]:
        """Return the arguments of the registered op between `key_mask` and `scale`."""
        axes = [list(each) for each in (self.grid, self.q_tile, self.kv_tile)]
        return (*axes, self.text_before, self.text_after)


ODD = Geometry((5, 7, 3), (2, 3, 2), (2, 4, 2), text_before=5, text_after=14)
"""Nothing divides anything: 124 tokens, partial tiles on each axis, text runs on both sides."""
