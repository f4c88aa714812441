"""From a share of the sequence to a share of the heads and back: two exchanges around a call.

`compiled_sparse::scatter_heads` takes queries, keys and values of this rank's tokens, all heads,
and returns those of all tokens, this rank's heads; `compiled_sparse::gather_heads` takes the output
back. Both are composite: tracing turns each into one functional all-to-all and copies around it.

A rank's tokens are the text before the video, a run of the video, and the text behind it. Runs are
equally long and in rank order; what the last ones have too much is padding. Text is on all ranks:
it is not sent, and each rank gets the output of all its heads. Method: DeepSpeed-Ulysses,
arXiv 2309.14509; any number of heads added here (`compiled_sparse.sharding.head_shares`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.collectives import all_to_all
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.sharding import HeadShare
from compiled_sparse.sharding import head_shares

_GROUP = "str group, int size, int rank"
_TEXT = "SymInt text_before, SymInt text_after"

LIBRARY.define(f"scatter_heads(Tensor[] tensors, {_GROUP}, SymInt num_video, {_TEXT}) -> Tensor[]")
LIBRARY.define(
    f"gather_heads(Tensor out, Tensor query, SymInt key_heads, {_GROUP}, {_TEXT}) -> Tensor"
)


def _scatter_heads(
    tensors: Sequence[Tensor],
    group: str,
    size: int,
    rank: int,
    num_video: int,
    text_before: int,
    text_after: int,
) -> list[Tensor]:
    """Return all tokens of this rank's heads.

    Args:
        tensors: Queries [batch, query heads, rows, head_dim], keys and values [batch, key heads,
            rows, head_dim], and what else has a row for every query, such as a gate.
        group: The process group's name.
        size: Its number of processes.
        rank: This process's place in it.
        num_video: Tokens of the whole video.
        text_before: Rows of text in front of the video's.
        text_after: Rows of text behind them.

    Returns:
        Each [batch, this rank's heads, text_before + num_video + text_after, head_dim], a view
        with unit last stride where there is no text.
    """
    query, key, *_ = tensors
    batch, num_heads, rows, width = query.shape
    plan = head_shares(num_heads, key.shape[1], size)
    heads = [[_heads_of(share, i) for i in range(len(tensors))] for share in plan]
    run = rows - text_before - text_after
    videos = [each.narrow(2, text_before, run) for each in tensors]
    sizes = [run * batch * sum(map(len, of_rank)) * width for of_rank in heads]
    own = heads[rank]
    number = sum(map(len, own))
    if _are_even(heads):
        parts = [each.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4) for each in videos]
        sent = torch.cat(parts, 3).flatten()
    else:
        sent = torch.cat([_rows_for(videos, of_rank).flatten() for of_rank in heads])
    received = all_to_all(sent, [run * batch * number * width] * size, sizes, group)
    tokens = received.view(size * run, batch, number, width).narrow(0, 0, num_video)
    found = [part.permute(1, 2, 0, 3) for part in tokens.split([len(each) for each in own], 2)]
    found = [
        _with_text(video, _pick(full, of_tensor), text_before, text_after)
        for video, full, of_tensor in zip(found, tensors, own, strict=True)
    ]
    return found if number else [_no_head(each, received) for each in found]


def _no_head(empty: Tensor, received: Tensor) -> Tensor:
    """One head of zeros for a rank without any, through which its gradient joins the exchange."""
    return empty.new_zeros((empty.shape[0], 1, *empty.shape[2:])) + received.sum()


def _heads_of(share: HeadShare, index: int) -> Sequence[int]:
    """The heads that a rank gets of one tensor: keys and values are the second and third."""
    return share.key if index in (1, 2) else range(*share.query)


def _are_even(heads: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether heads are dealt out in order, equally many to each rank."""
    for of_tensor in zip(*heads, strict=True):
        dealt = [head for share in of_tensor for head in share]
        if dealt != list(range(len(dealt))) or len(set(map(len, of_tensor))) > 1:
            return False
    return True


def _rows_for(videos: Sequence[Tensor], heads: Sequence[Sequence[int]]) -> Tensor:
    parts = [_pick(video, each) for video, each in zip(videos, heads, strict=True)]
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts], 2)


def _pick(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of a tensor [batch, heads, length, head_dim]; without a copy where in a row."""
    first = heads[0] if heads else 0
    if list(heads) == list(range(first, first + len(heads))):
        return tensor.narrow(1, first, len(heads))
    return torch.cat([tensor.narrow(1, head, 1) for head in heads], 1)


def _with_text(video: Tensor, full: Tensor, before: int, after: int) -> Tensor:
    if not before and not after:
        return video
    return torch.cat([full[:, :, :before], video, full[:, :, full.shape[2] - after :]], 2)


def _gather_heads(
    out: Tensor,
    query: Tensor,
    key_heads: int,
    group: str,
    size: int,
    rank: int,
    text_before: int,
    text_after: int,
) -> Tensor:
    """Return all heads of this rank's tokens.

    Args:
        out: [batch, this rank's heads, text_before + video + text_after, head_dim].
        query: The queries `scatter_heads` was given; only their shape is read.
        key_heads: Heads of the keys it was given.
        group: The process group's name.
        size: Its number of processes.
        rank: This process's place in it.
        text_before: Tokens of text in front of the video.
        text_after: Tokens of text behind it.

    Returns:
        [batch, query heads, rows, head_dim]; zero at the padding.
    """
    batch, num_heads, rows, _ = query.shape
    width = out.shape[3]
    counts = [share.num_query for share in head_shares(num_heads, key_heads, size)]
    own = out.narrow(1, 0, counts[rank])
    run = rows - text_before - text_after
    num_video = out.shape[2] - text_before - text_after
    video = own.narrow(2, text_before, num_video)
    if num_video != size * run:
        video = F.pad(video, (0, 0, 0, size * run - num_video))
    sent = video.unflatten(2, (size, run)).permute(2, 1, 3, 0, 4)
    if text_before or text_after:
        text = own.permute(1, 2, 0, 3).expand(size, -1, -1, -1, -1)
        behind = text.narrow(2, text_before + num_video, text_after)
        sent = torch.cat([text.narrow(2, 0, text_before), sent, behind], 2)
    one = rows * batch * width
    received = all_to_all(
        sent.flatten(), [count * one for count in counts], [counts[rank] * one] * size, group
    )
    return received.view(num_heads, rows, batch, width).permute(2, 0, 1, 3)


LIBRARY.impl("scatter_heads", _scatter_heads, "CompositeImplicitAutograd")
LIBRARY.impl("gather_heads", _gather_heads, "CompositeImplicitAutograd")
register_autocast_like_sdpa("scatter_heads")
