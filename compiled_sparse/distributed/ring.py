"""Ring attention: queries stay, keys and values go round, partial results are merged.

For mechanisms whose pattern is fixed, so that any subset of the keys can be computed apart.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.config import STA
from compiled_sparse.config import SWBA
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed import ring_op as _op  # noqa: F401 - defines the op
from compiled_sparse.distributed.ring_schedule import RingPattern
from compiled_sparse.errors import DistributedError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import MAX_GRID_AXES
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.layout import sequence_grid
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.sta import flatten_windows
from compiled_sparse.sharding import SequenceGroup

_DENSE_BLOCK = 128

_NEEDS_ALL_KEYS = {
    "vsa": "it selects tiles by comparing the means of all of them",
    "sla": "it selects blocks by comparing the means of all of them, and its linear branch sums "
    "over all keys",
    "sage_sla": "it selects blocks by comparing the means of all of them, smooths keys by their "
    "overall mean, and its linear branch sums over all keys",
    "vmoba": "each query selects among the chunks of all keys",
    "auto": "it chooses a mechanism only inside the compiler",
}


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MechanismConfig,
    *,
    group: SequenceGroup,
    grid_thw: tuple[int, ...],
    text: Text | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over a video whose frames are divided evenly among ranks.

    Rank r holds the r-th run of the video's raster order, with all text around it. Video queries
    are computed where they are; the keys they see come to them, and only whole layers of tiles that
    some query sees: a window costs a halo. Text queries are computed on every rank over its own
    video, and merged, so that every rank has the same text output to the bit.

    With H key heads, D channels, b bytes per element and the n video tokens a rank receives (its
    halo; for `Dense` those of all other ranks), a rank receives 2 * batch * H * n * D * b bytes in
    the forward pass, in as many messages as `ring_schedule` has steps. The backward pass receives
    them again, and sends gradients of the same size home. Text of t tokens adds 4 * batch * query
    heads * t * (D + 1) bytes from every other rank, and a sum over ranks of as much in the backward
    pass. Memory for other ranks' keys is that of two steps.

    Gradients of video tokens are complete. Those of text are parts: summed over the ranks, which is
    the caller's, they are the gradients of the sum of all ranks' losses. Every rank has to run the
    backward pass. In half dtypes what a step gives is rounded before it is merged in float32.

    Args:
        q: [batch, query heads, text before + own video + text after, head_dim].
        k: [batch, key heads, the same length, head_dim]; query heads is a multiple of key heads.
        v: like `k`.
        config: `Dense`, `STA` with one row of windows, or `SWBA` without text.
        group: The ranks, in the order of the shards.
        grid_thw: Token grid of the whole video.
        text: Text tokens around the video, the same on every rank.
        key_mask: bool [batch, text before + whole video + text after], True where the key is
            attended; the same on every rank.
        scale: Softmax scale; None means `head_dim ** -0.5`.

    Returns:
        The output of the own tokens, like q.

    Raises:
        DistributedError: if the mechanism, or its tiles on these frames and ranks, do not allow it;
            before anything is sent.
        ShapeError: if a tensor is not as long as grid, ranks and text say.
        ConfigError: if the windows are not one per query head.
        LayoutError: if the grid has another number of axes than the config.
    """
    text = text or Text()
    refusal = ring_refusal(config, size=group.size, grid_thw=grid_thw, text=text)
    if refusal is not None:
        raise DistributedError(
            f"{config.name or type(config).__name__} cannot go round a ring of ranks here",
            got=refusal,
            expected="Dense(), STA(...) with one row of windows, or SWBA(...) without text, and "
            "shards of whole layers of tiles",
            next_step="divide heads among the ranks instead, or change frames, tile or ranks",
        )
    config.check_heads(operator.index(q.shape[1]))  # a constant where sizes are symbolic
    pattern = ring_pattern(config, grid_thw, group.size)
    _check_tensors(q, k, v, key_mask, pattern, text)
    arguments = ring_arguments(pattern, group, text)
    out: Tensor = torch.ops.compiled_sparse.ring_attention(q, k, v, key_mask, *arguments, scale)
    return out


def ring_arguments(pattern: RingPattern, group: SequenceGroup, text: Text) -> tuple[Any, ...]:
    """Return what the op is given between the tensors and the scale.

    Args:
        pattern: What sees what.
        group: The ranks.
        text: Text tokens around the video.
    """
    windows = flatten_windows(pattern.windows)
    geometry = (pattern.kind, list(pattern.grid), list(pattern.tile), windows)
    return (*geometry, group.size, group.rank, group.name, text.before, text.after)


def ring_refusal(
    config: MechanismConfig, *, size: int, grid_thw: tuple[int, ...], text: Text | None = None
) -> str | None:
    """Return why a mechanism cannot go round a ring, in words, or None where it can.

    Args:
        config: The mechanism.
        size: Number of ranks.
        grid_thw: Token grid of the whole video.
        text: Text tokens around it.

    Raises:
        LayoutError: if the grid has another number of axes than the config.
    """
    if type(config) not in (Dense, STA, SWBA):
        unknown = "nobody can tell whether it may be computed for a subset of the keys"
        return f"{config.describe()}: {_NEEDS_ALL_KEYS.get(config.name, unknown)}"
    if config.table is not None:
        return (
            f"{config.describe()}: the row of a step and a layer is needed, config.at(step, layer)"
        )
    if config.grid_is_sequence and text is not None and text.before + text.after:
        return (
            f"{config.describe()} with {text}: its blocks run through the text, which no rank owns"
        )
    return _uneven(config, size, as_grid(grid_thw))


def _uneven(config: MechanismConfig, size: int, grid: tuple[int, ...]) -> str | None:
    """Return why a grid cannot be divided into shards of whole layers, or None where it can."""
    if isinstance(config, STA):
        extent, side = grid[0], config.resolve_tile(grid)[0]
        unit = "frames" if len(grid) == MAX_GRID_AXES else "tokens of the slowest axis"
    else:
        extent, unit = math.prod(grid), "tokens"
        side = config.block if isinstance(config, SWBA) else 1
    if size == 1 or extent % (size * side) == 0:
        return None
    fitting = [ranks for ranks in range(2, extent // side + 1) if extent % (ranks * side) == 0]
    nearest = [*[n for n in fitting if n < size][-1:], *[n for n in fitting if n > size][:1]]
    instead = f"; {extent} fit {' or '.join(map(str, nearest))} ranks" if nearest else ""
    return (
        f"{config.describe()} on grid {grid}: {extent} {unit} in tiles of {side} on {size} ranks, "
        f"which takes a multiple of {size * side} {unit}{instead}"
    )


def ring_pattern(config: MechanismConfig, grid_thw: tuple[int, ...], size: int) -> RingPattern:
    """Return the pattern of a config that `ring_refusal` does not refuse.

    Args:
        config: The mechanism.
        grid_thw: Token grid of the whole video.
        size: Number of ranks.

    Raises:
        LayoutError: if the grid has another number of axes than the config.
    """
    grid = as_grid(grid_thw)
    if isinstance(config, STA):
        tile = config.resolve_tile(grid)
        return RingPattern(kind="sta", grid=grid, tile=tile, windows=config.windows, size=size)
    sequence = sequence_grid(grid)
    if isinstance(config, SWBA):
        tile, windows = (config.block,), ((config.window,),)
        return RingPattern(kind="swba", grid=sequence, tile=tile, windows=windows, size=size)
    tile = (min(_DENSE_BLOCK, sequence[0] // size),)
    return RingPattern(kind="dense", grid=sequence, tile=tile, windows=(), size=size)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, pattern: RingPattern, text: Text
) -> None:
    """Check everything that would stop one rank while others wait for its message."""
    check_tensors(q, k, v, key_mask, ())
    check_shapes(q, k, v, None)
    around = text.before + text.after
    length, whole = pattern.shard_tokens + around, pattern.size * pattern.shard_tokens + around
    if not q.shape[2] == k.shape[2] == length:
        raise ShapeError(
            "q, k and v are not one rank's share of the sequence",
            got=f"{q.shape[2]} queries, {k.shape[2]} keys, {pattern.size} ranks, "
            f"grid {pattern.grid}, {text}",
            expected=f"length {length}: the own {pattern.shard_tokens} video tokens and the text",
            next_step="divide the video in raster order, and keep the text whole on every rank",
        )
    if key_mask is not None and tuple(key_mask.shape) != (q.shape[0], whole):
        raise ShapeError(
            "key_mask is not one of the whole sequence",
            got=str(tuple(key_mask.shape)),
            expected=f"[batch, length of the whole sequence] = {(q.shape[0], whole)}",
            next_step="pass the same mask on every rank, undivided",
        )
