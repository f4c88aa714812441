"""The wording of the errors of ring attention; see `test_messages.py`."""

from __future__ import annotations

from typing import Any

import torch
from messages import Case

import compiled_sparse as cs
from compiled_sparse.distributed.ring import ring_attention
from compiled_sparse.errors import DistributedError
from compiled_sparse.errors import ShapeError
from compiled_sparse.sharding import SequenceGroup

MODULES = ("distributed/ring",)

GROUP = SequenceGroup("no group of this name, so nothing can be sent", 2, 0)


def attend(length: int = 52, **changes: Any) -> None:
    """Half of 96 video tokens and 4 of text, on the first of two ranks."""
    q = torch.zeros(1, 2, length, 8)
    config = cs.STA(window_thw=(1, 3, 3), tile_thw=(3, 2, 2))
    arguments = {"config": config, "grid_thw": (6, 4, 4), "text": cs.Text(after=4), **changes}
    ring_attention(q, q, q, group=GROUP, **arguments)


CASES = {
    "mechanism for a ring": Case(
        DistributedError,
        "vsa cannot go round a ring of ranks here",
        "it selects tiles by comparing the means of all of them",
        "Dense(), STA(...) with one row of windows, or SWBA(...) without text",
        "divide heads among the ranks instead",
        lambda: attend(config=cs.VSA(sparsity=0.5)),
    ),
    "share of a ring": Case(
        ShapeError,
        "q, k and v are not one rank's share of the sequence",
        "100 queries, 100 keys, 2 ranks, grid (6, 4, 4), Text(before=0, after=4)",
        "length 52: the own 48 video tokens and the text",
        "divide the video in raster order",
        lambda: attend(length=100),
    ),
    "mask of a ring": Case(
        ShapeError,
        "key_mask is not one of the whole sequence",
        "(1, 52)",
        "[batch, length of the whole sequence] = (1, 100)",
        "the same mask on every rank, undivided",
        lambda: attend(key_mask=torch.ones(1, 52, dtype=torch.bool)),
    ),
}
