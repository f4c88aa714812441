"""Masked dense attention with every mechanism's mask written out token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import at_sparsity
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MissingGridError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.layout import sequence_grid
from compiled_sparse.registry import mechanism_of

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
    sparsity: float | None = None,
    gate: Tensor | None = None,
    proj: tuple[Tensor, Tensor | None] | None = None,
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
        config: `Dense()`, or the config of any mechanism.
        grid_thw: Token grid of the video; not needed for `Dense`, nor for mechanisms over the plain
            sequence (`SWBA`).
        text: Text tokens around the video.
        key_mask: bool [batch, key length], True where the key is attended.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        step: Denoising step, for a config with a table of windows; None means the first.
        layer: Layer, for the same.
        sparsity: Fraction of the work to leave out, in place of the config's (`VSA`).
        gate: [batch, query heads, length, head_dim], what weighs the compressed branch of `VSA`.
        proj: Weight [head_dim, head_dim] and bias [head_dim] behind the linear branch of `SLA`.
        return_lse: Also return the natural log-sum-exp.

    Returns:
        The output in v's dtype, and the log-sum-exp in the dtype of the arithmetic if asked for.

    Raises:
        MissingGridError: if a mask needs a grid and none was given.
        LayoutError: if grid and text do not add up to the lengths.
        ConfigError: if the config has no reference, or its windows are not one per query head.
    """
    config.check_gate(gate is not None)
    config.check_projection(proj)
    config.check_sparsity(sparsity)
    config = at_sparsity(config.at(step, layer), sparsity)
    if config.grid_is_sequence:
        grid_thw, text = _sequence(q.shape[2], grid_thw, text or Text()), None
    mechanism = mechanism_of(config)
    if mechanism is not None and mechanism.reference is not None:
        _checked_tile(config, q.shape[2], k.shape[2], grid_thw, text or Text())
        given = {"gate": gate, "proj": proj}
        optional = {name: value for name, value in given.items() if value is not None}
        both = mechanism.reference(
            q,
            k,
            v,
            config,
            grid_thw=grid_thw,
            text=text,
            key_mask=key_mask,
            scale=scale,
            **optional,
        )
        return both if return_lse else both[0]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
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


def _sequence(length: int, grid_thw: tuple[int, ...] | None, text: Text) -> tuple[int]:
    """Return the sequence as a grid of one axis; a grid that was given is checked later."""
    return (length,) if grid_thw is None else sequence_grid(grid_thw, text.before, text.after)


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
        grid_thw: Token grid; not needed for `Dense`, nor for mechanisms over the plain sequence.
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
    mechanism = mechanism_of(config)
    if mechanism is None or mechanism.token_mask is None:
        raise ConfigError(
            "this config has no reference made of a mask",
            got=repr(config),
            expected="Dense(), or the config of a mechanism whose mask is fixed, such as STA(...)",
            next_step="pass the config of one mechanism",
        )
    if config.grid_is_sequence:
        grid_thw, text = _sequence(key_length, grid_thw, text), Text()
    tile = _checked_tile(config, query_length, key_length, grid_thw, text)
    from_video = (queries - text.before, keys - text.before)
    return mechanism.token_mask(config, *from_video, tuple(grid_thw or ()), tile)[None]


def _checked_tile(
    config: MechanismConfig,
    query_length: int,
    key_length: int,
    grid_thw: tuple[int, ...] | None,
    text: Text,
) -> tuple[int, ...]:
    """Return the tile on a grid, which with the text has to add up to the lengths."""
    if grid_thw is None:
        raise MissingGridError(
            f"{config.name} needs the token grid",
            got="grid_thw=None",
            expected="the (T, H, W) grid of the video tokens",
            next_step="pass grid_thw=(T, H, W), counted after patching",
        )
    tile, grid = config.resolve_tile(tuple(grid_thw)), config.resolve_grid(tuple(grid_thw))
    length = BlockLayout(grid, tile, text.before, text.after).num_tokens
    if not length == query_length == key_length:
        raise LayoutError(
            "grid and text do not add up to the lengths of q and k",
            got=f"{query_length} queries, {key_length} keys, grid {grid_thw}, {text}",
            expected=f"length {length}",
            next_step="pass the grid in tokens after patching, and the text token counts",
        )
    return tile
