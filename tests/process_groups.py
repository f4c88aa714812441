"""Groups as a rank sees them, also of one process whose ranks are threads or take turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed
from torch.distributed import HashStore
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers "fake"

from compiled_sparse.sharding import SequenceGroup


def as_seen_here(group: distributed.ProcessGroup | None = None) -> SequenceGroup:
    """Return a group, by default that of all processes, as this rank sees it."""
    group = group or distributed.group.WORLD
    assert group is not None
    return SequenceGroup(group.group_name, group.size(), group.rank())


@contextmanager
def lone_group(
    size: int, store: distributed.Store | None = None, rank: int = 0
) -> Iterator[list[SequenceGroup]]:
    """Make a default process group without collectives, and yield it as each rank sees it.

    Args:
        size: Number of ranks.
        store: Where they meet; None for one in memory.
        rank: Which of them this process is.
    """
    distributed.init_process_group("fake", store=store or HashStore(), rank=rank, world_size=size)
    try:
        name = as_seen_here().name
        yield [SequenceGroup(name, size, rank) for rank in range(size)]
    finally:
        distributed.destroy_process_group()
