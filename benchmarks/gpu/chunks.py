"""Attention over chunks that queries select, against float64: values, gradients, equal bits."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.correctness import poisoned_memory
from benchmarks.gpu.reference import GRADIENTS
from benchmarks.gpu.reference import Problem
from benchmarks.gpu.reference import check_errors
from benchmarks.gpu.reference import exact
from benchmarks.gpu.reference import plain
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from compiled_sparse import ops
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.bit_masks import pack_bits
from compiled_sparse.reference.blocks import block_of_token

LAYOUTS = (
    BlockLayout((5, 9, 10), (2, 9, 10), 7, 77),
    BlockLayout((7, 15, 13), (3, 8, 4)),
    BlockLayout((7, 15, 13), (4, 16, 16), 0, 130),
    BlockLayout((37, 29), (8, 29)),
    BlockLayout((1500,), (700,)),
    BlockLayout((600,), (5,)),
)
QUICK_LAYOUTS = (BlockLayout((3, 5, 4), (2, 2, 3), 3, 15),)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class ChunkCheck:
    """One call that is compared with the reference; key heads are half of the query heads."""

    layout: BlockLayout
    dtype: torch.dtype
    head_dim: int = 64
    density: float = 0.3
    masked: bool = False

    @property
    def name(self) -> str:
        """The case in words."""
        layout, kind = self.layout, str(self.dtype).removeprefix("torch.")
        text = (layout.text_before, layout.text_after)
        masked = ", key mask" if self.masked else ""
        return (
            f"chunks {layout.tile} of {layout.grid} text {text} {kind} D{self.head_dim} "
            f"selected {self.density}{masked}"
        )


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the checks by name."""
    device = torch.device(settings.device)
    if settings.quick:
        chosen = [ChunkCheck(QUICK_LAYOUTS[0], torch.float32, 16, masked=True)]
    else:
        chosen = [
            *(ChunkCheck(*each, masked=True) for each in itertools.product(LAYOUTS, FLOATS)),
            *(ChunkCheck(LAYOUTS[1], *each) for each in itertools.product(FLOATS, HEAD_DIMS)),
            *(ChunkCheck(LAYOUTS[1], FLOATS[2], 128, density) for density in (0.0, 0.02, 1.0)),
        ]
    return {case.name: functools.partial(_check, case, device) for case in chosen}


def _check(case: ChunkCheck, device: torch.device) -> dict[str, Any]:
    problem, words, shown = _problem(case, torch.Generator(device).manual_seed(0))
    with poisoned_memory():
        results = _call(case.layout, problem, words, shown)
    errors = check_errors(results, exact(problem), list(plain(problem)))
    assert results["out"].transpose(1, 2).is_contiguous(), "out: not BLHD memory"
    again = _call(case.layout, problem, words, shown)
    differ = [name for name, value in results.items() if not torch.equal(value, again[name])]
    assert not differ, f"two equal calls differ in {', '.join(differ)}"
    return {"errors_over_plain": {name: round(ratio, 3) for name, ratio in errors.items()}}


def _call(layout: BlockLayout, problem: Problem, words: Tensor, shown: Tensor) -> dict[str, Tensor]:
    """Return outputs and gradients of the op, with NaN in the keys that are hidden."""
    hidden = ~shown[:, None, :, None]
    k, v = (each.masked_fill(hidden, float("nan")) for each in (problem.k, problem.v))
    leaves = [each.detach().requires_grad_() for each in (problem.q, k, v)]
    out, lse = ops.chunk_sparse_attention(
        leaves[0],
        leaves[1],
        leaves[2],
        words,
        grid=layout.grid,
        tile=layout.tile,
        key_mask=None if bool(shown.all()) else shown,
        text_before=layout.text_before,
        text_after=layout.text_after,
    )
    # A query without a key has log-sum-exp -inf, which nothing can be weighed with.
    finite = lse.masked_fill(lse.isinf(), 0.0)
    gradients = torch.autograd.grad((out, finite), leaves, (problem.grad_out, problem.grad_lse))
    named = dict(zip(GRADIENTS, gradients, strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **named}


def _problem(case: ChunkCheck, generator: torch.Generator) -> tuple[Problem, Tensor, Tensor]:
    """Return the call as a dense one, the words of its selection, and which keys are shown."""
    device, layout = generator.device, case.layout
    length = layout.num_tokens
    random = functools.partial(torch.rand, generator=generator, device=device)

    def normal(heads: int) -> Tensor:
        shape = (2, length, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(case.dtype).transpose(1, 2)

    q, k, v, grad_out = normal(4), normal(2), normal(2), normal(4)
    selection = random(2, 4, layout.num_blocks, length) < case.density
    shown = random(2, length) < 0.8 if case.masked else random(2, length) < 2
    mask = selection.mT[..., block_of_token(layout).to(device)] & shown[:, None, None]
    grad_lse = torch.randn(2, 4, length, generator=generator, device=device)
    scale = float(case.head_dim) ** -0.5
    hidden = ~shown[:, None, :, None]
    k, v = (each.masked_fill(hidden, 0.0) for each in (k, v))
    return Problem(q, k, v, mask, grad_out, grad_lse, scale), pack_bits(selection), shown
