"""Who holds what where a sequence is divided among processes: pure integers.

Every rank derives the same numbers from the same inputs, so nothing here is ever communicated.
Method: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import operator
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
        is_ring: Whether keys go round among them, instead of heads being divided (Ulysses).
    """

    name: str
    size: int
    rank: int
    is_ring: bool = False


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
        key: The key heads that serve them, in order.
    """

    query: tuple[int, int]
    key: tuple[int, ...]

    @property
    def num_query(self) -> int:
        """Number of query heads."""
        return self.query[1] - self.query[0]

    @property
    def computed(self) -> tuple[int, int]:
        """The query heads to compute: a rank without any has a head of zeros, as if the first."""
        return self.query if self.num_query else (0, 1)


def head_shares(num_heads: int, num_key_heads: int, parts: int) -> tuple[HeadShare, ...]:
    """Divide query heads among ranks, each with the key heads that serve them.

    Any number of heads will do. Query heads that share a key head stay together where there is a
    key head for every rank; else a key head is sent to several ranks, and once per query head to a
    rank whose query heads have different ones.

    Args:
        num_heads: Query heads.
        num_key_heads: Key heads; divides the query heads.
        parts: Number of ranks.

    Returns:
        One share per rank; empty where there are more ranks than heads.
    """
    # Who has which head is the structure of a graph: traced numbers become constants.
    num_heads, num_key_heads = operator.index(num_heads), operator.index(num_key_heads)
    group = num_heads // num_key_heads
    unit = group if num_key_heads >= parts else 1
    found: list[HeadShare] = []
    start = 0
    for count in shares(num_heads // unit, parts):
        stop = start + count * unit
        keys = tuple(head // group for head in range(start, stop))
        is_shared = unit == group or len(set(keys)) == 1
        found.append(HeadShare((start, stop), tuple(dict.fromkeys(keys)) if is_shared else keys))
        start = stop
    return tuple(found)


def run_length(num_video: int, parts: int) -> int:
    """Return how many of a video's tokens each rank holds, padding included.

    Args:
        num_video: Tokens of the whole video.
        parts: Number of ranks.
    """
    return -(-num_video // parts)


def unpadded_runs(num_video: int, group: SequenceGroup) -> set[int]:
    """Return how many tokens this rank would hold where padding was forgotten.

    Args:
        num_video: Tokens of the whole video.
        group: The ranks.

    Returns:
        Its number as `Tensor.chunk` and as `Tensor.tensor_split` divide; empty where it needs no
        padding.
    """
    run = run_length(num_video, group.size)
    left = num_video - group.rank * run
    return {count for count in (left, shares(num_video, group.size)[group.rank]) if 0 < count < run}


def sequence_group(where: Any) -> SequenceGroup:
    """Return the processes a device mesh or a process group says.

    Args:
        where: A `DeviceMesh`, all but one of its dimensions of size 1, or a `ProcessGroup`. A
            dimension called "ring" means that keys go round; any other, that heads are divided.

    Raises:
        DistributedError: if it is neither, several dimensions are divided, or this process is not
            in it.
    """
    is_ring = False
    if hasattr(where, "mesh_dim_names"):
        where, is_ring = _sole_dimension(where)
    group = where.get_group() if hasattr(where, "get_group") else where
    if not hasattr(group, "group_name"):
        raise DistributedError(
            "this names no processes",
            got=repr(where)[:80],
            expected="a torch.distributed DeviceMesh or ProcessGroup that this process is in",
            next_step='pass init_device_mesh("cuda", (world_size,)), for instance',
        )
    return SequenceGroup(str(group.group_name), group.size(), group.rank(), is_ring)


def _sole_dimension(mesh: Any) -> tuple[Any, bool]:
    """The one dimension of a mesh that is longer than one, and whether it is a ring."""
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    divided = [i for i, size in enumerate(mesh.mesh.shape) if size > 1]
    if len(divided) > 1:
        raise DistributedError(
            "the mesh divides the sequence along several dimensions",
            got=f"dimensions {names} of sizes {tuple(mesh.mesh.shape)}",
            expected="one dimension longer than 1; rings of groups that divide heads are not there",
            next_step='pass one of them: mesh["ulysses"], for instance',
        )
    index = divided[0] if divided else 0
    return (mesh if mesh.ndim == 1 else mesh[names[index]]), names[index] == "ring"
