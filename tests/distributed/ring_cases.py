"""One attention on one process and on a ring of several, for tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.ring import ring_attention
from compiled_sparse.layout import Text
from compiled_sparse.sharding import SequenceGroup

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

    def share(self, x: Tensor, rank: int, size: int) -> Tensor:
        """Return what a rank holds of [batch, heads, length, ...]."""
        n = math.prod(self.grid) // size
        before, behind = self.text.before, x.shape[2] - self.text.after
        start = before + rank * n
        return torch.cat([x[:, :, :before], x[:, :, start : start + n], x[:, :, behind:]], dim=2)

    def joined(self, parts: list[Tensor], *, sums_text: bool) -> Tensor:
        """Return the whole of what ranks hold; of text the sum over ranks, or what all have."""
        before, after = self.text.before, self.text.after
        n = math.prod(self.grid) // len(parts)
        video = [part[:, :, before : before + n] for part in parts]
        fronts = torch.stack([part[:, :, :before] for part in parts])
        backs = torch.stack([part[:, :, before + n :] for part in parts])
        assert backs.shape[3] == after
        texts = [each.sum(0) if sums_text else each[0] for each in (fronts, backs)]
        return torch.cat([texts[0], *video, texts[1]], dim=2)


def group() -> SequenceGroup:
    world = distributed.group.WORLD
    assert world is not None
    return SequenceGroup(world.group_name, distributed.get_world_size(), distributed.get_rank())


def in_ring(case: RingCase, compiler: str | Callable[..., Any] | None = None) -> Found:
    """Return this rank's output and gradients; the loss counts text on the first rank only."""
    ring = group()
    inputs, weights = case.tensors()
    q, k, v = (case.share(x, ring.rank, ring.size).requires_grad_() for x in inputs)
    weights = case.share(weights, ring.rank, ring.size)
    if ring.rank:
        weights[:, :, : case.text.before] = 0.0
        weights[:, :, weights.shape[2] - case.text.after :] = 0.0

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


def collectives_of_graphs(case: RingCase) -> list[list[str]]:
    """Return the collectives of the compiled forward and backward graph on this rank, in order."""
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        graphs.append([name for name in names if name.startswith("_c10d_functional")])
        return make_boxed_func(graph.forward)

    in_ring(case, aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition))
    return graphs
