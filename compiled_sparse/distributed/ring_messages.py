"""Messages between ranks, one after the other, as functional collectives.

A compiler may merge collectives that look alike, drop those whose result nobody reads, and order
independent ones as it likes. On one rank of several that is a deadlock, and a rank without a part
in a step has a graph unlike the others'. So every message holds a token that its rank sends to
itself, taken from the message before it: all differ, all are read, and their order is one of data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
import torch.distributed._functional_collectives  # tells compilers to keep every wait
from torch import Tensor

from compiled_sparse.sharding import SequenceGroup

Shape = tuple[int, ...]

# As many elements as keep what follows aligned to 64 bytes or more, as bulk copies need.
_TOKEN_SIZE = 64


class Messages:
    """The messages of one forward or backward pass; at most one is under way.

    Args:
        group: The ranks.
        seed: [batch, heads, length, head_dim], what the first token is taken from; messages between
            two ranks have its dtype.
    """

    def __init__(self, group: SequenceGroup, seed: Tensor) -> None:
        self._group = group
        self._dtype = seed.dtype
        self._token = seed[0, 0, 0, :1].expand(_TOKEN_SIZE)
        self._received: Tensor | None = None
        self._incoming: list[tuple[int, Shape]] = []

    def start(
        self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Shape]]
    ) -> None:
        """Send tensors to other ranks and begin to receive theirs.

        Args:
            outgoing: Receivers and tensors.
            incoming: Senders and shapes, of one sender in the order in which it sends.
        """
        rank, size = self._group.rank, self._group.size
        pieces = sorted([*outgoing, (rank, self._token.to(self._dtype))], key=itemgetter(0))
        self._incoming = [*incoming, (rank, (_TOKEN_SIZE,))]
        self._received = torch.ops._c10d_functional.all_to_all_single(
            torch.cat([piece.flatten() for _, piece in pieces]),
            _per_rank(size, [(source, math.prod(shape)) for source, shape in self._incoming]),
            _per_rank(size, [(target, piece.numel()) for target, piece in pieces]),
            self._group.name,
        )

    def finish(self) -> list[Tensor]:
        """Wait for what was started, and return what was received in the order of `incoming`."""
        received = torch.ops._c10d_functional.wait_tensor(self._received)
        order = sorted(range(len(self._incoming)), key=lambda place: self._incoming[place][0])
        shapes = [self._incoming[place][1] for place in order]
        pieces = received.split([math.prod(shape) for shape in shapes])
        found = {
            place: piece.view(shape)
            for place, piece, shape in zip(order, pieces, shapes, strict=True)
        }
        self._token = found.pop(len(self._incoming) - 1)
        return [found[place] for place in sorted(found)]

    def gather(self, mine: Tensor) -> Tensor:
        """Return a tensor of every rank, all of one shape; the ranks are a new first axis."""
        packed = torch.cat([mine.flatten(), self._token.to(mine.dtype)])
        size, name = self._group.size, self._group.name
        pending = torch.ops._c10d_functional.all_gather_into_tensor(packed, size, name)
        received: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
        every = received.view(size, -1)
        self._token = every[0, -_TOKEN_SIZE:]
        return every[:, :-_TOKEN_SIZE].reshape(size, *mine.shape)

    def sum(self, mine: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        packed = torch.cat([mine.flatten(), self._token.to(mine.dtype)])
        partial = torch.ops._c10d_functional.all_reduce(packed, "sum", self._group.name)
        total: Tensor = torch.ops._c10d_functional.wait_tensor(partial)
        self._token = total[-_TOKEN_SIZE:]
        return total[:-_TOKEN_SIZE].view(mine.shape)


def _per_rank(size: int, numbers: Sequence[tuple[int, int]]) -> list[int]:
    """Add up numbers of elements by rank."""
    totals = [0] * size
    for rank, number in numbers:
        totals[rank] += number
    return totals
