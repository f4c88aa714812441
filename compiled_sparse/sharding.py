"""Who holds what where a sequence is divided among processes: pure integers.

Every rank derives the same numbers from the same inputs, so nothing here is ever communicated.
Method: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compiled_sparse.errors import DistributedError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The processes that one sequence is divided among.

    Args:
        name: The process group's name, as functional collectives take it.
        size: Number of processes.
        rank: This process's place among them, from 0.
    """

    name: str
    size: int
    rank: int


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Divide items among ranks in order; the first ones get one more where it does not come out.

    Args:
        total: Number of items, such as heads.
        parts: Number of ranks.
    """
    each, rest = divmod(total, parts)
    return tuple(each + (rank < rest) for rank in range(parts))


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads one rank computes.

    Args:
        query: First query head and the one behind the last.
        key: First key head and the one behind the last; heads that serve query heads of two ranks
            are in both.
    """

    query: tuple[int, int]
    key: tuple[int, int]


def head_shares(num_heads: int, num_key_heads: int, parts: int) -> tuple[HeadShare, ...]:
    """Divide query heads among ranks, each with the key heads that serve them.

    Any number of heads will do. Query heads are dealt out in whole groups of those that share a key
    head where there are enough of them, so that no key head is sent twice; else one by one, as many
    to a rank as make its key heads serve equally many.

    Args:
        num_heads: Query heads.
        num_key_heads: Key heads; divides the query heads.
        parts: Number of ranks.

    Returns:
        One share per rank; empty where there are more ranks than heads.
    """
    group = num_heads // num_key_heads
    if num_key_heads >= parts:
        unit, number = group, num_key_heads
    else:
        unit, number = 1, num_heads
    found: list[HeadShare] = []
    start = 0
    for count in shares(number, parts):
        stop = start + count * unit
        key = (start // group, -(-stop // group)) if stop > start else (0, 0)
        found.append(HeadShare((start, stop), key))
        start = stop
    return tuple(found)
