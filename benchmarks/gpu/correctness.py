"""The kernel op against float64: values, gradients, bits of a second call, memory nobody wrote."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import CheckCase
from benchmarks.gpu.cases import check_cases
from benchmarks.gpu.cases import quick_cases
from benchmarks.gpu.reference import GRADIENTS
from benchmarks.gpu.reference import Problem
from benchmarks.gpu.reference import check_errors
from benchmarks.gpu.reference import exact
from benchmarks.gpu.reference import gather_rows
from benchmarks.gpu.reference import gathered_problem
from benchmarks.gpu.reference import list_mask
from benchmarks.gpu.reference import plain
from benchmarks.gpu.reference import scatter_rows
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.settings import SkippedError
from benchmarks.gpu.variants import variant
from compiled_sparse import ops
from compiled_sparse.layout import BlockLayout

GARBAGE = 1_000_000
"""Fills the unused tail of a list: reading it would be an error."""

LARGE_HEADS, LARGE_HEAD_DIM, LARGE_LISTED = 40, 128, 2
LARGE = "more than 2^31 elements"


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the checks of this section by name, the cheapest to lose last."""
    chosen = quick_cases() if settings.quick else check_cases()
    device = torch.device(settings.device)
    functions: dict[str, CaseFunction] = {
        case.name: functools.partial(check, case, device) for case in chosen
    }
    functions[LARGE] = functools.partial(check_large, device, quick=settings.quick)
    return functions


def check(case: CheckCase, device: torch.device) -> dict[str, Any]:
    """Check one call, forward and backward.

    Returns:
        Error over that of the worst plain implementation, by output.

    Raises:
        AssertionError: if something is wrong.
    """
    generator = torch.Generator(device).manual_seed(0)
    layouts = case.layouts
    lists = _lists(case, *layouts, generator)
    inputs, key_mask = _inputs(case, *layouts, generator)
    weights = _weights(case, inputs[0], generator)

    def call() -> dict[str, Tensor]:
        return _call(case, inputs, lists, key_mask, weights)

    with variant(case.variant, device), poisoned_memory():
        results = call()
    problem = _problem(case, inputs, lists, key_mask, weights)
    errors = check_errors(results, exact(problem), list(plain(problem)))
    _check_outputs(results, inputs[0], problem.empty)
    with variant(case.variant, device):
        _check_same_bits(call(), call())
    return {"errors_over_plain": {name: round(ratio, 3) for name, ratio in errors.items()}}


def _call(
    case: CheckCase,
    inputs: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    weights: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    out, lse = ops.block_sparse_attention(
        leaves[0],
        leaves[1],
        leaves[2],
        *lists,
        grid=case.grid,
        q_tile=case.q_tile,
        kv_tile=case.kv_tile or case.q_tile,
        key_mask=key_mask,
        text_before=case.text[0],
        text_after=case.text[1],
        scale=case.scale,
    )
    # A query without a key has log-sum-exp -inf, which nothing can be weighed with.
    finite = lse.masked_fill(lse.isinf(), 0.0)
    gradients = torch.autograd.grad((out, finite), leaves, weights)
    named = dict(zip(GRADIENTS, gradients, strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **named}


def _lists(
    case: CheckCase, q_layout: BlockLayout, kv_layout: BlockLayout, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    batch, heads = case.list_shape or (case.batch, case.heads)
    rows, blocks = q_layout.num_blocks, kv_layout.num_blocks
    device = generator.device
    shape = (batch, heads, rows)
    if case.lists == "none":
        return torch.zeros(*shape, 0, device=device).int(), torch.zeros(shape, device=device).int()
    order = torch.rand(*shape, blocks, generator=generator, device=device).argsort(dim=-1).int()
    if case.lists == "full":
        return order, torch.full(shape, blocks, device=device).int()
    counts = torch.randint(0, blocks + 1, shape, generator=generator, device=device)
    counts[..., 0] = 0
    counts[..., -1] = blocks
    unused = torch.arange(blocks, device=device) >= counts[..., None]
    return order.masked_fill(unused, GARBAGE), counts.int()


def _inputs(
    case: CheckCase, q_layout: BlockLayout, kv_layout: BlockLayout, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    def random(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, generator=generator, device=generator.device)

    kv_heads, length = case.kv_heads or case.heads, kv_layout.num_tokens
    q = (random(case.heads, q_layout.num_tokens) * case.magnitude).to(case.dtype)
    k = (random(kv_heads, length) * case.magnitude).to(case.dtype)
    v = random(kv_heads, length).to(case.dtype)
    key_mask = None
    if case.masked:
        shape = (case.batch, length)
        key_mask = torch.rand(shape, generator=generator, device=generator.device) < 0.8
        key_mask[0, -3:] = False
        key_mask[:, 0] = True
        if case.batch > 1:
            key_mask[-1] = False
        hidden = ~key_mask[:, None, :, None]
        k, v = (each.masked_fill(hidden, float("nan")) for each in (k, v))
    rearrange = REARRANGED[case.strides]
    return (rearrange(q), rearrange(k), rearrange(v)), key_mask


def _weights(case: CheckCase, q: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random gradients of output and log-sum-exp."""
    random = functools.partial(torch.randn, generator=generator, device=q.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grad_out = REARRANGED[case.grad_strides](random(q.shape).to(q.dtype))
    return grad_out, random(q.shape[:-1]).to(lse_dtype)


def _in_nan(tensor: Tensor) -> Tensor:
    """The same values with NaN all around in memory."""
    return F.pad(tensor, (3, 2, 1, 4), value=float("nan"))[..., 1:-4, 3:-2]


REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "BLHD memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "L and D swapped": lambda x: x.mT.contiguous().mT,
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one batch for all": lambda x: x[:1].expand_as(x),
    "a slice of NaN": _in_nan,
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, 1::2],
}


def _problem(
    case: CheckCase,
    inputs: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    weights: tuple[Tensor, Tensor],
) -> Problem:
    """The same call as a dense one; what hidden keys hold is left out before any arithmetic."""
    q, k, v = inputs
    mask = list_mask(*lists, *case.layouts)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
        hidden = ~key_mask[:, None, :, None]
        k, v = (each.masked_fill(hidden, 0.0) for each in (k, v))
    scale = float(case.head_dim) ** -0.5 if case.scale is None else case.scale
    return Problem(q, k, v, mask, *weights, scale)


def _check_outputs(results: dict[str, Tensor], q: Tensor, empty: Tensor) -> None:
    """Check dtypes, memory order, and rows without keys, which must be exactly zero."""
    out, lse = results["out"], results["lse"]
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert out.dtype == q.dtype, f"out is {out.dtype}"
    assert lse.dtype == expected, f"lse is {lse.dtype}"
    assert out.transpose(1, 2).is_contiguous(), f"out has strides {out.stride()}, not BLHD memory"
    assert torch.equal(lse == float("-inf"), empty), "lse is not -inf exactly where no key is seen"
    assert bool((out[empty] == 0).all()), "out of a query without keys is not 0"
    assert bool((results["grad_q"][empty] == 0).all()), "grad_q of a query without keys is not 0"


def _check_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    differ = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not differ, f"two equal calls differ in {', '.join(differ)}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh allocation with NaN, so that an element nobody wrote is seen."""
    fill = torch.utils.deterministic
    outer = fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        fill.fill_uninitialized_memory = outer


def check_large(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Check tensors whose offsets do not fit into 31 bits, by all rows of their last head.

    Raises:
        AssertionError: if something is wrong.
        SkippedError: if the memory is too small.
    """
    grid, heads = ((9, 10, 7), 3) if quick else ((65, 80, 84), LARGE_HEADS)
    layout = BlockLayout(grid, (4, 4, 4))
    shape = (1, heads, math.prod(grid), LARGE_HEAD_DIM)
    with_gradients = quick or _fits(shape, device)
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v, grad_out = (random().requires_grad_(with_gradients) for _ in range(4))
    indices = torch.randint(
        layout.num_blocks - 1, (1, 1, layout.num_blocks, 1), generator=generator, device=device
    )
    # Two different blocks: a random one, and the one before the last.
    indices = torch.cat([indices, torch.full_like(indices, layout.num_blocks - 1)], dim=-1).int()
    counts = torch.full(indices.shape[:-1], LARGE_LISTED, device=device).int()
    geometry = {"grid": grid, "q_tile": layout.tile, "kv_tile": layout.tile}
    out, lse = ops.block_sparse_attention(q, k, v, indices, counts, **geometry)
    results = {"out": out.detach()[0, -1], "lse": lse.detach()[0, -1]}
    if with_gradients:
        gradients = torch.autograd.grad(out, (q, k, v), grad_out.detach())
        results |= {n: g[0, -1] for n, g in zip(GRADIENTS, gradients, strict=True)}
    head = (q.detach()[0, -1], k.detach()[0, -1], v.detach()[0, -1])
    errors = _check_head(results, head, grad_out.detach()[0, -1], indices, counts, layout)
    return {"elements": q.numel(), "with_gradients": with_gradients, "errors_over_plain": errors}


def _fits(shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether the backward fits into memory, too; eight tensors and the float64 of one head."""
    if device.type != "cuda":
        raise SkippedError("too long for a CPU")
    one = 2 * math.prod(shape)
    free = torch.cuda.mem_get_info()[0]
    if free < 5 * one + 2**33:
        raise SkippedError(f"needs {(5 * one + 2**33) / 2**30:.0f} GiB of free memory")
    return free > 11 * one + 2**33


def _check_head(
    results: dict[str, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    indices: Tensor,
    counts: Tensor,
    layout: BlockLayout,
) -> dict[str, float]:
    """Check one head, gathered: its queries block by block with the keys they list."""
    every = torch.arange(layout.num_blocks, device=indices.device)
    rows = gather_rows(indices[0, 0], counts[0, 0], every, layout, layout)
    length = layout.num_tokens
    grad_lse = grad_out.new_zeros(length, dtype=torch.float32)
    problem = gathered_problem(tensors, grad_out, grad_lse, rows)
    truth = scatter_rows(exact(problem), rows, length)
    plains = [scatter_rows(next(plain(problem)), rows, length)]
    return {n: round(r, 3) for n, r in check_errors(results, truth, plains).items()}
