"""Masked dense attention with every mechanism's mask written out token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.config import STA
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MissingGridError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text

_QUERY_CHUNK = 1024


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MechanismConfig,
    *,
    grid_thw: tuple[int, ...] | None = None,
    text: Text | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    step: int | None = None,
    layer: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense masked attention with the signature and meaning of `compiled_sparse.attention`.

    Any floating dtype; scores and softmax are computed in float32, or float64 for float64 inputs.
    Differentiable any number of times. Cost and memory are those of dense attention on 1024 queries
    at a time.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: like `k`.
        config: `Dense()` or `STA(...)`.
        grid_thw: Token grid of the video; not needed for `Dense`.
        text: Text tokens around the video.
        key_mask: bool [batch, key length], True where the key is attended.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        step: Denoising step, for a config with a table of windows; None means the first.
        layer: Layer, for the same.
        return_lse: Also return the natural log-sum-exp.

    Returns:
        The output in v's dtype, and the log-sum-exp in the dtype of the arithmetic if asked for.

    Raises:
        MissingGridError: if a mask needs a grid and none was given.
        LayoutError: if grid and text do not add up to the lengths.
        ConfigError: if the config has no reference, or its windows are not one per query head.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if isinstance(config, STA):
        config = config.at(step, layer)
        config.check_heads(q.shape[1])
    groups = q.shape[1] // k.shape[1]
    keys = k.to(compute).repeat_interleave(groups, dim=1)
    values = v.to(compute).repeat_interleave(groups, dim=1)
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask[:, None, :, None], 0.0)
        values = values.masked_fill(~key_mask[:, None, :, None], 0.0)
    outputs, lses = [], []
    for start in range(0, q.shape[2], _QUERY_CHUNK):
        rows = slice(start, min(start + _QUERY_CHUNK, q.shape[2]))
        mask = token_mask(config, rows, q.shape[2], k.shape[2], grid_thw, text or Text(), q.device)
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, :]
        scores = scale * (q[:, :, rows].to(compute) @ keys.transpose(-1, -2))
        out, lse = _masked_softmax_times(scores, mask, values)
        outputs.append(out)
        lses.append(lse)
    output = torch.cat(outputs, dim=2).to(v.dtype)
    return (output, torch.cat(lses, dim=2)) if return_lse else output


def _masked_softmax_times(scores: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over visible keys; a row without any gives 0 and -inf."""
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    empty = lse == float("-inf")
    weights = (scores - lse.masked_fill(empty, 0.0)[..., None]).exp()
    return weights @ values, lse


def token_mask(
    config: MechanismConfig,
    rows: slice,
    query_length: int,
    key_length: int,
    grid_thw: tuple[int, ...] | None,
    text: Text,
    device: torch.device | None = None,
) -> Tensor:
    """Return which keys the queries in `rows` see.

    Args:
        config: The mechanism.
        rows: Range of query positions.
        query_length: Length of the query sequence.
        key_length: Length of the key sequence.
        grid_thw: Token grid; not needed for `Dense`.
        text: Text tokens around the video.
        device: Device of the mask.

    Returns:
        bool [1, 1 or heads, rows, key_length].

    Raises:
        MissingGridError: if the mechanism needs a grid and none was given.
        LayoutError: if grid and text do not add up to the lengths.
        ConfigError: if the mechanism has no reference.
    """
    queries = torch.arange(query_length, device=device)[rows]
    keys = torch.arange(key_length, device=device)
    if isinstance(config, Dense):
        return torch.ones(1, 1, len(queries), key_length, dtype=torch.bool, device=device)
    if not isinstance(config, STA):
        raise ConfigError(
            "this config has no reference",
            got=repr(config),
            expected="Dense() or STA(...)",
            next_step="pass the config of one mechanism",
        )
    if grid_thw is None:
        raise MissingGridError(
            f"{config.name} needs the token grid",
            got="grid_thw=None",
            expected="the (T, H, W) grid of the video tokens",
            next_step="pass grid_thw=(T, H, W), counted after patching",
        )
    tile = config.resolve_tile(tuple(grid_thw))
    length = BlockLayout(tuple(grid_thw), tile, text.before, text.after).num_tokens
    if not length == query_length == key_length:
        raise LayoutError(
            "grid and text do not add up to the lengths of q and k",
            got=f"{query_length} queries, {key_length} keys, grid {grid_thw}, {text}",
            expected=f"length {length}",
            next_step="pass the grid in tokens after patching, and the text token counts",
        )
    heads = [
        _sta_mask(queries - text.before, keys - text.before, grid_thw, tile, window)
        for window in config.at().windows
    ]
    return torch.stack(heads)[None]


def _sta_mask(
    queries: Tensor,
    keys: Tensor,
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    window: tuple[int, ...],
) -> Tensor:
    """Mechanism rule by rule: text sees all and is seen by all; video sees its window of tiles.

    Positions are counted from the first video token, so text positions are negative or past the
    grid.
    """
    num_video = 1
    for extent in grid:
        num_video *= extent
    query_is_text = (queries < 0) | (queries >= num_video)
    key_is_text = (keys < 0) | (keys >= num_video)
    visible = torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    stride = num_video
    for extent, side, nominal in zip(grid, tile, window, strict=True):
        stride //= extent
        query_tile = (queries // stride % extent // side)[:, None]
        key_tile = (keys // stride % extent // side)[None, :]
        visible &= _axis_visible(query_tile, key_tile, -(-extent // side), nominal)
    return visible | query_is_text[:, None] | key_is_text[None, :]


def _axis_visible(query_tile: Tensor, key_tile: Tensor, num_tiles: int, nominal: int) -> Tensor:
    half = nominal // 2
    width = 2 * half + 1
    if width >= num_tiles:
        return (key_tile >= 0) & (query_tile >= 0)
    first = (query_tile - half).clamp(min=0, max=num_tiles - width)
    return (key_tile >= first) & (key_tile < first + width)
