"""One call of ring attention on one rank: its geometry, and what the kernel op is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.distributed.ring_lists import part_of
from compiled_sparse.distributed.ring_schedule import Part
from compiled_sparse.distributed.ring_schedule import RingPattern
from compiled_sparse.distributed.ring_schedule import Step
from compiled_sparse.distributed.ring_schedule import ring_schedule
from compiled_sparse.layout import Text
from compiled_sparse.ops.sta import flatten_windows
from compiled_sparse.sharding import SequenceGroup

_LENGTH = 2  # the axis


@dataclass(frozen=True, kw_only=True)
class RingCall:
    """What is no tensor in one call.

    Args:
        pattern: What sees what.
        text: Text tokens around the video.
        group: The ranks.
        scale: Softmax scale.
    """

    pattern: RingPattern
    text: Text
    group: SequenceGroup
    scale: float

    @property
    def steps(self) -> tuple[Step, ...]:
        """The messages that bring keys."""
        return ring_schedule(self.pattern)

    @property
    def own(self) -> Part:
        """What is computed with the own keys."""
        part = part_of(self.pattern, self.group.rank, self.group.rank)
        assert part is not None
        return part

    def part(self, step: Step) -> Part | None:
        """Return what is computed with the keys that a step brings here, if it brings any."""
        return step.parts[self.group.rank]

    @property
    def shares_text(self) -> bool:
        """Whether there are text queries, whose keys are on several ranks."""
        return self.text.before + self.text.after > 0 and self.group.size > 1

    def layers(self, x: Tensor, first: int, count: int) -> Tensor:
        """Return some layers of the own video, of [batch, heads, length, ...]."""
        layer = self.pattern.layer_tokens
        return x.narrow(_LENGTH, self.text.before + first * layer, count * layer)

    def queries(self, x: Tensor, part: Part) -> Tensor:
        """Return the queries of a part with other ranks' keys, of [batch, heads, length, ...]."""
        return self.layers(x, part.query_first, part.count)

    def texts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text in front and behind, of [batch, heads, length, ...]."""
        behind = x.shape[_LENGTH] - self.text.after
        front = x.narrow(_LENGTH, 0, self.text.before)
        return front, x.narrow(_LENGTH, behind, self.text.after)

    def put_texts(self, x: Tensor, both: Tensor) -> None:
        """Write text, in front and behind in one tensor, into [batch, heads, length, ...]."""
        lengths = [self.text.before, self.text.after]
        for place, text in zip(self.texts(x), both.split(lengths, dim=_LENGTH), strict=True):
            place.copy_(text)

    def kernel_arguments(
        self, part: Part, key_mask: Tensor | None, device: torch.device
    ) -> tuple[Any, ...]:
        """Return what the kernel op is given behind q, k and v, and its backward behind the lse."""
        pattern, is_own = self.pattern, part.source == self.group.rank
        before, after = (self.text.before, self.text.after) if is_own else (0, 0)
        extent = pattern.shard_grid[0] if is_own else part.count * pattern.layer_extent
        tile = list(pattern.tile)
        lists = torch.ops.compiled_sparse.ring_block_lists(
            pattern.kind,
            list(pattern.grid),
            tile,
            flatten_windows(pattern.windows),
            pattern.size,
            self.group.rank,
            part.source,
            before,
            after,
            device,
        )
        mask = None if key_mask is None else self._visible_keys(key_mask, part)
        grid = [extent, *pattern.grid[1:]]
        return (*lists, mask, grid, tile, tile, before, after, self.scale)

    def _visible_keys(self, key_mask: Tensor, part: Part) -> Tensor:
        """Cut the mask of the whole sequence to a part's keys."""
        shard, first = self.pattern.shard_tokens, self.text.before
        if part.source != self.group.rank:
            layer = self.pattern.layer_tokens
            start = first + part.source * shard + part.key_first * layer
            return key_mask.narrow(1, start, part.count * layer)
        own = key_mask.narrow(1, first + part.source * shard, shard)
        behind = key_mask.narrow(1, first + self.pattern.size * shard, self.text.after)
        return torch.cat([key_mask.narrow(1, 0, first), own, behind], dim=1)
