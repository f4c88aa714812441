"""One attention on one process and on a ring of several, for tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from functorch.compile import make_boxed_func
from functorch.compile import min_cut_rematerialization_partition
from sharded import shard_of
from sharded import whole_of
from torch import Tensor
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.ring import ring_attention
from compiled_sparse.layout import Text
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.sharding import sequence_group

Found = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class RingCase:
    """What is computed; tensors follow from it, the same in every process."""

    config: MechanismConfig
    grid: tuple[int, ...]
    text: Text = Text()
    heads: int = 3
    key_heads: int = 3
    batch: int = 2
    dtype: torch.dtype = torch.float64
    hidden: tuple[int, ...] = ()
    """Keys of the whole sequence that the mask hides."""
    scale: float | None = None

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text.before + self.text.after

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """Return q, k, v and the weights of the loss, over the whole sequence."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        q, k, v, weights = (
            torch.randn(self.batch, each, self.length, 8, generator=generator).to(self.dtype)
            for each in heads
        )
        return [q, k, v], weights

    def key_mask(self) -> Tensor | None:
        if not self.hidden:
            return None
        mask = torch.ones(self.batch, self.length, dtype=torch.bool)
        mask[0, list(self.hidden)] = False
        return mask

    def counted_once(self, x: Tensor, rank: int) -> Tensor:
        """Return a rank's [batch, heads, length, ...], with text on the first rank only."""
        video = torch.ones(x.shape[2], 1, dtype=x.dtype)
        video[: self.text.before] = video[x.shape[2] - self.text.after :] = 0.0
        return x if rank == 0 else x * video

    def whole_of(self, shares: list[Tensor]) -> Tensor:
        """Return the whole of what ranks hold; rows of text are summed."""
        return whole_of(shares, math.prod(self.grid), self.text)


def group() -> SequenceGroup:
    return sequence_group(distributed.group.WORLD)


def in_ring(case: RingCase, compiler: str | Callable[..., Any] | None = None) -> Found:
    """Return this rank's output and gradients; the loss counts text on the first rank only."""
    ring = group()
    inputs, weights = case.tensors()
    *inputs, weights = (shard_of(x, ring.rank, ring.size, case.text) for x in (*inputs, weights))
    q, k, v = (x.requires_grad_() for x in inputs)
    weights = case.counted_once(weights, ring.rank)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            case.config,
            group=ring,
            grid_thw=case.grid,
            text=case.text,
            key_mask=case.key_mask(),
            scale=case.scale,
        )

    if compiler is not None:
        attend = torch.compile(attend, backend=compiler, fullgraph=True)
    out = attend(q, k, v)
    return out.detach(), list(torch.autograd.grad(out, (q, k, v), weights))


def in_rings(cases: list[RingCase], compiler: str | None = None) -> list[Found]:
    """Return `in_ring` of several cases, for the price of one start of processes."""
    return [in_ring(case, compiler) for case in cases]


@lru_cache
def on_one(case: RingCase, compute: torch.dtype | None = None) -> Found:
    """Return the reference's output and gradients over the whole sequence, in a dtype."""
    inputs, weights = case.tensors()
    inputs = [x.to(compute or x.dtype).requires_grad_() for x in inputs]
    weights = weights.to(compute or weights.dtype)
    out = cs.reference.attention(
        *inputs,
        case.config,
        grid_thw=case.grid,
        text=case.text,
        key_mask=case.key_mask(),
        scale=case.scale,
    )
    assert isinstance(out, Tensor)
    return out.detach(), list(torch.autograd.grad(out, inputs, weights))


WORDS = {
    "_c10d_functional::all_to_all_single": "send",
    "_c10d_functional::all_gather_into_tensor": "gather",
    "_c10d_functional::all_reduce": "sum",
    "_c10d_functional::wait_tensor": "wait",
    "compiled_sparse::block_sparse_attention": "attend",
    "compiled_sparse::block_sparse_attention_backward": "back",
}


class _Recorder(TorchDispatchMode):
    """Notes collectives and kernel ops in order, and what crosses from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.received: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        word = WORDS.get(func._schema.name)
        if word is not None:
            self.order.append(word)
        if word == "send":
            rank = distributed.get_rank()
            self.received.append(sum(size for i, size in enumerate(args[1]) if i != rank))
        return func(*args, **(kwargs or {}))


def recorded(cases: list[RingCase]) -> list[tuple[list[str], list[int]]]:
    """Return what this rank does in both passes, in order, and the elements each message brings."""
    found = []
    for case in cases:
        with _Recorder() as recorder:
            in_ring(case)
        found.append((recorder.order, recorder.received))
    return found


def graphs_of(cases: list[RingCase]) -> list[list[list[str]]]:
    """Return this rank's collectives in the forward and the backward graph of each case."""
    return [_collectives_of_graphs(case) for case in cases]


def _collectives_of_graphs(case: RingCase) -> list[list[str]]:
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        graphs.append([name for name in names if name.startswith("_c10d_functional")])
        return make_boxed_func(graph.forward)

    in_ring(case, aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition))
    return graphs
