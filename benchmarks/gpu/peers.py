"""What the kernel is measured beside: dense attention at its best, flex_attention, moved tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.timing import interleaved_medians
from compiled_sparse import ops
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import block_tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Clock = Callable[[Callable[[], Any]], float]

DENSE_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
_PROBE_ROUNDS = 2
_FLEX_STEP = 64
_FLEX_BLOCKS = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 4,
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4,
}
"""What flex_attention's kernels step by where blocks are no multiple of 128, their own choice."""


@dataclass(frozen=True)
class Dense:
    """The fastest backend of dense attention.

    Args:
        backend: Which one.
        milliseconds: Of every backend that ran.
        errors: Why the others did not.
    """

    backend: SDPBackend
    milliseconds: dict[str, float]
    errors: dict[str, str]

    @property
    def name(self) -> str:
        """Short name of the backend."""
        return _short(self.backend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        return dense(self.backend, q, k, v)


def _short(backend: SDPBackend) -> str:
    return str(backend.name).removesuffix("_ATTENTION").lower()


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend densely with one backend."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def gradient_call(attend: Attend, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    """Return a function that runs the backward pass alone."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = attend(leaves[0], leaves[1], leaves[2])
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _dense_call(
    backend: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor], direction: str
) -> Callable[[], Any]:
    attend = functools.partial(dense, backend)
    if direction == "backward":
        return gradient_call(attend, inputs, torch.ones_like(inputs[0]))
    return functools.partial(attend, *inputs)


def fastest_dense(
    inputs: tuple[Tensor, Tensor, Tensor], direction: str, clock: Clock
) -> Dense | str:
    """Try all backends of dense attention; return the fastest, or why there is none."""
    times: dict[SDPBackend, float] = {}
    errors: dict[str, str] = {}
    for backend in DENSE_BACKENDS:
        try:
            call = _dense_call(backend, inputs, direction)
            call()
            times[backend] = interleaved_medians(
                {"dense": call}, _PROBE_ROUNDS, clock=clock, warm_up_seconds=0
            )["dense"]
        except RuntimeError as error:
            errors[_short(backend)] = first_line(error)
    if not times:
        return "no backend runs: " + "; ".join(f"{n}: {e}" for n, e in errors.items())
    best = min(times, key=times.__getitem__)
    return Dense(best, {_short(b): 1e3 * t for b, t in times.items()}, errors)


def first_line(error: BaseException) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@dataclass(frozen=True)
class TileOrder:
    """A sequence whose tokens are moved so that every block is a run, padded to full blocks.

    Args:
        layout: The sequence's layout.
        tokens: Which token is in each slot, [blocks, block size], -1 where there is none.
    """

    layout: BlockLayout
    tokens: Tensor

    @staticmethod
    def of(layout: BlockLayout, device: torch.device) -> TileOrder:
        """Return the order of a layout."""
        return TileOrder(layout, block_tokens(layout).to(device).long())

    @property
    def valid(self) -> Tensor | None:
        """Which slots hold a token, [slots]; None if all do."""
        valid = (self.tokens >= 0).flatten()
        return None if bool(valid.all()) else valid

    def move(self, tensor: Tensor) -> Tensor:
        """Bring [batch, heads, length, head_dim] into tile order; a copy."""
        moved = tensor.transpose(1, 2).index_select(1, self.tokens.flatten().clamp_min(0))
        return moved.transpose(1, 2)

    def place_of_tokens(self) -> Tensor:
        """Return the slot of every token, [length]."""
        slots = torch.arange(self.tokens.numel(), device=self.tokens.device)
        flat = self.tokens.flatten()
        place = torch.empty(self.layout.num_tokens, dtype=torch.long, device=flat.device)
        place[flat[flat >= 0]] = slots[flat >= 0]
        return place

    def runs(self, indices: Tensor, counts: Tensor) -> Attend:
        """Return the kernel op on tokens in tile order, where every block is a run."""
        size = self.layout.block_size
        valid = self.valid

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = None if valid is None else valid.expand(q.shape[0], -1)
            out, _ = ops.block_sparse_attention(
                q,
                k,
                v,
                indices,
                counts,
                grid=(q.shape[2],),
                q_tile=(size,),
                kv_tile=(size,),
                key_mask=mask,
            )
            return out

        return attend


def flex_order(layout: BlockLayout, device: torch.device) -> tuple[TileOrder, str]:
    """Return the order that flex_attention gets its tokens in, and what to know about it.

    Its kernels take blocks of whole steps, so a block of 60 tokens becomes one of 64 slots.
    """
    order = TileOrder.of(layout, device)
    size = layout.block_size
    slots = -(-size // _FLEX_STEP) * _FLEX_STEP
    padding = order.tokens.new_full((len(order.tokens), slots - size), -1)
    order = TileOrder(layout, torch.cat([order.tokens, padding], dim=1))
    note = f"tokens in tile order outside the timing, blocks of {slots} slots"
    if order.valid is not None:
        note += ", blocks with empty slots under a mask function"
    return order, note


def flex_attend(order: TileOrder, indices: Tensor, counts: Tensor, *, compiled: bool) -> Attend:
    """Return flex_attention with the same lists of blocks, on tokens in tile order."""
    slots = order.tokens.shape[1]
    mask = _flex_mask(order, indices, counts)
    options = _FLEX_BLOCKS if slots % 128 else {}
    attend = flex_attention
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: attend(q, k, v, block_mask=mask, kernel_options=dict(options))


def _flex_mask(order: TileOrder, indices: Tensor, counts: Tensor) -> BlockMask:
    """The lists as full blocks, and blocks with empty slots as partial ones."""
    blocks, size = order.tokens.shape
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    partial = (order.tokens < 0).any(1)[indices.long().masked_fill(~listed, 0)]
    valid = order.valid
    mask_mod = None
    if valid is not None:

        def mask_mod(_batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
            return valid[key]

    parts = []
    for chosen in (listed & partial, listed & ~partial):
        # The chosen entries first, then as many more as there are blocks, which nobody reads.
        order_of_row = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)
        rows = indices.masked_fill(~listed, 0).gather(-1, order_of_row)
        parts += [chosen.sum(-1).int(), F.pad(rows, (0, blocks - rows.shape[-1])).int()]
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=size, mask_mod=mask_mod)
