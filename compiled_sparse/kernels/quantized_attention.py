"""Host side of quantised attention: buffers, tiles and numbers of programs.

Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_sparse.kernels import launch
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.attention import Call
from compiled_sparse.kernels.attention import Sides
from compiled_sparse.kernels.attention import all_keys_valid
from compiled_sparse.kernels.attention import list_strides
from compiled_sparse.kernels.attention import needs_wide_addresses
from compiled_sparse.kernels.lists import heavy_first
from compiled_sparse.kernels.quantize import quantize_keys
from compiled_sparse.kernels.quantize import quantize_queries
from compiled_sparse.kernels.quantize import round_values
from compiled_sparse.kernels.quantized_forward import attention_forward_quantized

CHIPS_WITHOUT_FLOAT8 = ("sm_80", "gfx942")
"""gfx942 multiplies another format of eight bits than float8_e4m3fn."""

_PEAKS = {torch.float8_e4m3fn: 448.0, torch.float16: 1.0}
_MOST_ROWS = 128
_MOST_KEYS_BESIDE_IT = 64
"""More spill registers on sm_80 and pass the shared memory of gfx942."""

_FEWEST_ROWS = 32
"""As many keys as a product of eight-bit operands sums at least."""

_STAGES = 3
_QUANTIZER_WARPS = {"sm_120": 16}
_OTHER_QUANTIZER_WARPS = 8
"""As few as spill nothing."""

_CHIPS_WITH_ROOM = ("sm_90", "sm_100", "gfx942")


class Heads(NamedTuple):
    """Numbers that were derived from whole heads, contiguous.

    Args:
        mean: The mean key, [batch, key heads, 1, head_dim], in k's dtype.
        multiplier: float32 [batch, key heads, 1, head_dim], applied to values before rounding.
        v_scale: float32 [batch, key heads, 1, head_dim], what undoes it.
        dtype: What values and weights are rounded to.
    """

    mean: Tensor
    multiplier: Tensor
    v_scale: Tensor
    dtype: torch.dtype


class _Blocks(NamedTuple):
    """How the blocks of one sequence are stored: `chunks` runs of `rows` slots each."""

    grid: Sides
    tile: Sides
    number: int
    rows: int
    chunks: int


def has_float8() -> bool:
    """Whether the chip that kernels run on now has products of float8_e4m3fn."""
    return tuning.current_chip() not in CHIPS_WITHOUT_FLOAT8


def quantized_forward(call: Call, heads: Heads, out: Tensor, lse: Tensor) -> None:
    """Write the attention of every query block over its listed key blocks, and its log-sum-exp.

    Args:
        call: The call.
        heads: What was derived from whole heads.
        out: Like q, last stride 1.
        lse: float32 [batch, query heads, query length], contiguous.
    """
    geometry = call.geometry
    queries = _stored(geometry.q_grid, geometry.q_tile, geometry.q_blocks, _MOST_ROWS)
    most_keys = _MOST_KEYS_BESIDE_IT if queries.rows == _MOST_ROWS else _MOST_ROWS
    keys = _stored(geometry.k_grid, geometry.k_tile, geometry.k_blocks, most_keys)
    q_codes, q_scales = _quantize_queries(call, heads.mean, queries, lse)
    k_codes, k_scales = _quantize_keys(call, heads.mean, keys)
    rounded = _round_values(call, heads, keys)
    order = heavy_first(call.counts, call.indices.shape[-1])
    batch, q_heads, q_length, head_dim = call.q.shape
    groups = q_heads // call.k.shape[1]
    arguments = (
        *(q_codes, k_codes, rounded, q_scales, k_scales, heads.v_scale, out, lse),
        *(call.indices, call.counts, order, call.key_mask, out.stride()[:-1]),
        *list_strides(call.indices),
        *list_strides(order)[:2],
        *(keys.number, queries.number, q_heads, groups, q_length, call.k.shape[2]),
        *(geometry.before, geometry.behind, *queries.grid, *keys.grid),
    )
    constants = {
        "Q_TILE": queries.tile,
        "K_TILE": keys.tile,
        "HAS_TEXT": geometry.before + geometry.behind > 0,
        "HAS_MASK": call.key_mask is not None,
        "BLOCK_M": queries.rows,
        "BLOCK_N": keys.rows,
        "HEAD_DIM": head_dim,
        "Q_CHUNKS": queries.chunks,
        "K_CHUNKS": keys.chunks,
        "K_FULL": all_keys_valid(call, keys.rows),
        "WIDE": needs_wide_addresses(out),
        "PEAK": _PEAKS[heads.dtype],
    }
    launch.run(
        attention_forward_quantized,
        batch * q_heads * queries.number * queries.chunks,
        arguments,
        constants,
        warps=_warps(queries, keys),
        stages=_STAGES,
    )


def _warps(queries: _Blocks, keys: _Blocks) -> int:
    """Four where nothing spills: two programs then share a multiprocessor."""
    if queries.rows == _MOST_ROWS:
        return 8
    has_room = tuning.current_chip() in _CHIPS_WITH_ROOM
    return 4 if has_room or keys.rows < _MOST_ROWS else 8


def _stored(grid: Sides, tile: Sides, number: int, most: int) -> _Blocks:
    rows = max(tuning.chunk_rows(math.prod(tile), most), _FEWEST_ROWS)
    return _Blocks(grid, tile, number, rows, -(-math.prod(tile) // rows))


def _codes(x: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], blocks.number, blocks.chunks)
    codes = x.new_empty((*shape, blocks.rows, x.shape[3]), dtype=torch.int8)
    return codes, x.new_empty(shape[:3], dtype=torch.float32)


def _quantize_queries(
    call: Call, mean: Tensor, blocks: _Blocks, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return codes and scales; `shares` gets what the mean key adds to the scores."""
    q, before, behind = call.q, call.geometry.before, call.geometry.behind
    codes, scales = _codes(q, blocks)
    sizes = (blocks.number, q.shape[1], q.shape[1] // call.k.shape[1], q.shape[2])
    arguments = (
        *(q, mean, codes, scales, shares, q.stride()[:-1], call.scale),
        *(*sizes, *blocks.grid, before, behind),
    )
    programs = q.shape[0] * q.shape[1] * blocks.number
    warps = _QUANTIZER_WARPS.get(tuning.current_chip(), _OTHER_QUANTIZER_WARPS)
    launch.run(quantize_queries, programs, arguments, _constants(call, q, blocks), warps=warps)
    return codes, scales


def _quantize_keys(call: Call, mean: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    k = call.k
    codes, scales = _codes(k, blocks)
    arguments = (k, mean, call.key_mask, codes, scales, *_key_arguments(call, k, blocks))
    constants = _constants(call, k, blocks) | {"HAS_MASK": call.key_mask is not None}
    launch.run(quantize_keys, k.shape[0] * k.shape[1] * blocks.number, arguments, constants)
    return codes, scales


def _round_values(call: Call, heads: Heads, blocks: _Blocks) -> Tensor:
    v = call.v
    shape = (*v.shape[:2], blocks.number, blocks.chunks, v.shape[3], blocks.rows)
    rounded = torch.empty(shape, dtype=heads.dtype, device=v.device)
    arguments = (v, heads.multiplier, call.key_mask, rounded, *_key_arguments(call, v, blocks))
    constants = _constants(call, v, blocks) | {"HAS_MASK": call.key_mask is not None}
    launch.run(round_values, math.prod(shape[:4]), arguments, constants)
    return rounded


def _key_arguments(call: Call, x: Tensor, blocks: _Blocks) -> tuple[Any, ...]:
    text = (call.geometry.before, call.geometry.behind)
    return (x.stride()[:-1], blocks.number, x.shape[1], x.shape[2], *blocks.grid, *text)


def _constants(call: Call, x: Tensor, blocks: _Blocks) -> dict[str, Any]:
    return {
        "TILE": blocks.tile,
        "HAS_TEXT": call.geometry.before + call.geometry.behind > 0,
        "ROWS": blocks.rows,
        "CHUNKS": blocks.chunks,
        "HEAD_DIM": x.shape[3],
        "WIDE": needs_wide_addresses(x),
    }
