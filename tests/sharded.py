"""A sequence divided among ranks by hand: what each rank holds, and the whole again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import compiled_sparse as cs

NO_TEXT = cs.Text()


def shard_of(whole: Tensor, rank: int, size: int, text: cs.Text = NO_TEXT) -> Tensor:
    """Return a rank's rows of [batch, heads, length, head_dim]: its run of the video, all text."""
    before, after = whole[:, :, : text.before], whole[:, :, whole.shape[2] - text.after :]
    video = whole[:, :, text.before : whole.shape[2] - text.after]
    run = -(-video.shape[2] // size)
    video = F.pad(video, (0, 0, 0, run * size - video.shape[2]))
    return torch.cat([before, video[:, :, rank * run : (rank + 1) * run], after], 2)


def whole_of(shards: Sequence[Tensor], num_video: int, text: cs.Text = NO_TEXT) -> Tensor:
    """Return the whole of what ranks hold; rows of text, which all have, are summed."""
    stop = shards[0].shape[2] - text.after
    videos = [each[:, :, text.before : stop] for each in shards]
    before = sum(each[:, :, : text.before] for each in shards)
    after = sum(each[:, :, stop:] for each in shards)
    return torch.cat([before, torch.cat(videos, 2)[:, :, :num_video], after], 2)
