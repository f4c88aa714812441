"""Who needs whose keys when a ring of ranks computes one attention: pure integers.

The video is cut along its slowest axis into layers: one tile thick, or a whole shard where no
pattern cuts it. Every rank holds as many layers. Which layers see which follows from the pattern
alone, so every rank derives the same schedule, and nothing of it is communicated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from compiled_sparse.layout import BlockLayout
from compiled_sparse.pattern import effective_width
from compiled_sparse.pattern import window_start
from compiled_sparse.windows import Window

Kind = Literal["dense", "sta", "swba"]


@dataclass(frozen=True, kw_only=True)
class RingPattern:
    """A fixed pattern over a video that is divided evenly among ranks.

    Args:
        kind: What the windows mean: "sta" has one for all heads or one per query head, in tiles per
            axis; "swba" has one, in blocks; "dense" has none.
        grid: Tokens per axis of the whole video; one axis for "dense" and "swba".
        tile: Tokens per axis of a tile.
        windows: The windows.
        size: Number of ranks.
    """

    kind: Kind
    grid: tuple[int, ...]
    tile: tuple[int, ...]
    windows: tuple[Window, ...]
    size: int

    @property
    def shard_grid(self) -> tuple[int, ...]:
        """Tokens per axis of what one rank holds."""
        return (self.grid[0] // self.size, *self.grid[1:])

    @property
    def shard_tokens(self) -> int:
        """Tokens of what one rank holds."""
        return math.prod(self.shard_grid)

    @property
    def layer_extent(self) -> int:
        """Tokens of a layer along the slowest axis."""
        return self.shard_grid[0] if self.kind == "dense" else self.tile[0]

    @property
    def layer_tokens(self) -> int:
        """Tokens of a full layer."""
        return self.layer_extent * math.prod(self.grid[1:])

    @property
    def layer_tiles(self) -> int:
        """Tiles of a layer."""
        return BlockLayout((self.layer_extent, *self.grid[1:]), self.tile).num_video_blocks

    @property
    def layers_per_shard(self) -> int:
        """Layers that one rank holds; a partial one counts."""
        return -(-self.shard_grid[0] // self.layer_extent)

    @property
    def num_layers(self) -> int:
        """Layers of the whole video."""
        return self.size * self.layers_per_shard

    def visible(self, layer: int) -> tuple[int, int]:
        """Return the first layer that the queries of one see, of any head, and the one behind."""
        if self.kind == "dense":
            return 0, self.num_layers
        if self.kind == "swba":
            ((window,),) = self.windows
            return max(0, layer + 1 - window), layer + 1
        starts = [window_start(self.num_layers, window[0], layer) for window in self.windows]
        widths = [effective_width(self.num_layers, window[0]) for window in self.windows]
        stops = [start + width for start, width in zip(starts, widths, strict=True)]
        return min(starts), max(stops)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank computes with the keys of another.

    As many layers of queries as of keys, so that one grid describes both.

    Args:
        source: The rank whose keys they are.
        query_first: First layer of queries within the own shard.
        key_first: First layer of keys within the source's shard.
        count: Layers of either.
    """

    source: int
    query_first: int
    key_first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of the round: every rank hears from the rank `offset` places before it, or none.

    Args:
        offset: From 1 to the number of ranks, exclusive.
        parts: What each rank computes with what it receives; None where it receives nothing.
    """

    offset: int
    parts: tuple[Part | None, ...]

    def sent_by(self, rank: int) -> tuple[int, Part] | None:
        """Return whom a rank sends keys to and what for, or None where it sends nothing."""
        receiver = (rank + self.offset) % len(self.parts)
        part = self.parts[receiver]
        return None if part is None else (receiver, part)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One exchange among all ranks.

    Args:
        keys: The step whose keys it brings.
        home: The step whose gradients it takes back to where its keys came from.
    """

    keys: Step | None = None
    home: Step | None = None


@lru_cache(maxsize=64)
def ring_schedule(pattern: RingPattern) -> tuple[Step, ...]:
    """Return the messages of one attention in order; those that nobody needs are left out.

    Args:
        pattern: What sees what, and how many ranks.
    """
    steps = []
    for offset in range(1, pattern.size):
        ranks = range(pattern.size)
        parts = tuple(ring_part(pattern, rank, (rank - offset) % pattern.size) for rank in ranks)
        if any(parts):
            steps.append(Step(offset=offset, parts=parts))
    return tuple(steps)


def backward_messages(steps: tuple[Step, ...]) -> tuple[Message, ...]:
    """Return the messages of the backward pass.

    A step's gradients travel with the keys of the second step after it, so that what follows can be
    under way while a step is computed.

    Args:
        steps: What `ring_schedule` returned.
    """
    if not steps:
        return ()
    homes = (None, None, *steps)
    bringing = (Message(keys=step, home=home) for step, home in zip(steps, homes, strict=False))
    return (*bringing, *(Message(home=step) for step in steps[-2:]))


def ring_part(pattern: RingPattern, rank: int, source: int) -> Part | None:
    """Return which queries of a rank see which keys of another, in layers; None where none do."""
    per_shard = pattern.layers_per_shard
    first_key = source * per_shard
    queries, keys = [], []
    for layer in range(per_shard):
        start, stop = pattern.visible(rank * per_shard + layer)
        start, stop = max(start, first_key), min(stop, first_key + per_shard)
        if start < stop:
            queries.append(layer)
            keys += [start - first_key, stop - first_key]
    if not queries:
        return None
    count = max(queries[-1] + 1 - queries[0], max(keys) - min(keys))
    return Part(
        source=source,
        query_first=min(queries[0], per_shard - count),
        key_first=min(min(keys), per_shard - count),
        count=count,
    )
