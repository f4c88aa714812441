"""Process groups of one process, whose ranks are threads or take turns, for tests of handshakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed
from torch.distributed import HashStore
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers "fake"

from compiled_sparse.sharding import SequenceGroup


@contextmanager
def lone_group(size: int, store: distributed.Store | None = None) -> Iterator[list[SequenceGroup]]:
    """Make a default process group without collectives, and yield it as each rank sees it.

    Args:
        size: Number of ranks.
        store: Where they meet; None for one in memory.
    """
    distributed.init_process_group("fake", store=store or HashStore(), rank=0, world_size=size)
    try:
        group = distributed.group.WORLD
        assert group is not None
        yield [SequenceGroup(group.group_name, size, rank) for rank in range(size)]
    finally:
        distributed.destroy_process_group()
