"""Host side of the attention kernels: strides, tiles and numbers of programs.

Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Any
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled_sparse.kernels import launch
from compiled_sparse.kernels import tuning
from compiled_sparse.kernels.backward import attention_backward_keys
from compiled_sparse.kernels.backward import attention_backward_queries
from compiled_sparse.kernels.backward import row_sums
from compiled_sparse.kernels.box_launch import box_of
from compiled_sparse.kernels.box_launch import descriptors
from compiled_sparse.kernels.box_launch import takes_boxes
from compiled_sparse.kernels.boxes import attention_forward_boxes
from compiled_sparse.kernels.forward import attention_forward
from compiled_sparse.kernels.lists import heavy_first
from compiled_sparse.kernels.lists import transpose_lists
from compiled_sparse.kernels.tuning import Tile

Sides = tuple[int, int, int]

ROW_ELEMENTS = 2048
"""How many elements a program takes that handles every row by itself."""

_ADDRESS_LIMIT = 2**31


class Geometry(NamedTuple):
    """Where the blocks of queries and keys lie; grids of fewer axes have leading ones.

    Args:
        q_grid: Token grid (T, H, W) of the queries.
        k_grid: Token grid of the keys.
        q_tile: Tile sides of query blocks.
        k_tile: Tile sides of key blocks.
        before: Text tokens in front of both grids.
        behind: Text tokens behind both grids.
        q_blocks: Number of query blocks, text runs included.
        k_blocks: Number of key blocks, text runs included.
    """

    q_grid: Sides
    k_grid: Sides
    q_tile: Sides
    k_tile: Sides
    before: int
    behind: int
    q_blocks: int
    k_blocks: int


class Call(NamedTuple):
    """One call of the op, as the kernels take it.

    Args:
        q: [batch, query heads, query length, head_dim], last stride 1.
        k: [batch, key heads, key length, head_dim], last stride 1.
        v: Like `k`.
        indices: int32 [batch or 1, query heads or 1, query blocks, width], contiguous.
        counts: int32 [batch or 1, query heads or 1, query blocks], contiguous.
        key_mask: bool [batch, key length], contiguous, or None.
        geometry: Where the blocks lie.
        scale: Softmax scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    key_mask: Tensor | None
    geometry: Geometry
    scale: float


def block_sparse_forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the attention of every query block over its listed key blocks, and its log-sum-exp.

    Args:
        call: The call.
        out: Like q, last stride 1.
        lse: float32 (float64 for float64) [batch, query heads, query length], contiguous.
    """
    chip = tuning.current_chip()
    if tuning.wants_boxes(chip) and takes_boxes(call, chip):
        forward_boxes(call, out, lse)
    else:
        forward_rows(call, out, lse)


def block_sparse_backward(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of q, k and v for fixed lists; deterministic.

    Args:
        call: The call.
        grad_out: Like q, last stride 1.
        grad_lse: [batch, query heads, query length], contiguous, or None for zero.
        out: The output of the forward, last stride 1.
        lse: The log-sum-exp of the forward, contiguous.
        gradients: Where to, last stride 1.
    """
    grad_q, grad_k, grad_v = gradients
    delta = torch.empty_like(lse)
    write_row_sums(grad_out, grad_lse, out, lse, delta)
    query_gradient(call, grad_out, lse, delta, grad_q)
    key_gradients(call, grad_out, lse, delta, grad_k, grad_v)


def forward_rows(call: Call, out: Tensor, lse: Tensor) -> None:
    """The forward whose programs compute the address of every row; arguments as above."""
    tile = _choose("forward", call, call.geometry.q_tile, call.geometry.k_tile)
    order = heavy_first(call.counts, call.indices.shape[-1])
    batch, heads = call.q.shape[:2]
    arguments = (
        *(call.q, call.k, call.v, out, lse, call.indices, call.counts, order, call.key_mask),
        *map(row_strides, (call.q, call.k, call.v, out)),
        *list_strides(call.indices),
        *list_strides(order),
        *_integers(call, call.geometry.q_blocks, heads),
    )
    launch.run(
        attention_forward,
        batch * heads * call.geometry.q_blocks * _chunks(call.geometry.q_tile, tile.own),
        arguments,
        _constants(call, tile, out, rows=tile.own, columns=tile.other),
        warps=tile.warps,
        stages=tile.stages,
    )


def forward_boxes(call: Call, out: Tensor, lse: Tensor) -> None:
    """The forward that lets the bulk copy engine fetch tiles, where `takes_boxes` says it can."""
    geometry = call.geometry
    tile = _choose("forward_boxes", call, geometry.q_tile, geometry.k_tile)
    box = box_of(geometry.k_tile, tile.other)
    order = heavy_first(call.counts, call.indices.shape[-1])
    batch, heads = call.q.shape[:2]
    tile = tile._replace(other=math.prod(box))
    constants = _constants(call, tile, out, rows=tile.own, columns=tile.other) | {"BOX": box}
    for name in ("HAS_MASK", "JOINED"):
        del constants[name]
    size = math.prod(geometry.k_tile)
    text_before = triton.cdiv(geometry.before, size)
    text_blocks = text_before + triton.cdiv(geometry.behind, size)
    for entry in range(batch):
        boxes = descriptors(call, entry, box, constants["BLOCK_D"])
        own_order = order if order.shape[0] == 1 else order[entry : entry + 1]
        arguments = (
            *(call.q, call.k, call.v, out, lse, call.indices, call.counts, own_order, *boxes),
            *map(row_strides, (call.q, call.k, call.v, out)),
            *list_strides(call.indices),
            *list_strides(order),
            *(entry, text_blocks, text_before, geometry.k_blocks - text_blocks),
            *_integers(call, geometry.q_blocks, heads),
        )
        launch.run(
            attention_forward_boxes,
            heads * geometry.q_blocks * _chunks(geometry.q_tile, tile.own),
            arguments,
            constants,
            warps=tile.warps,
            stages=tile.stages,
        )


def write_row_sums(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, delta: Tensor
) -> None:
    """Write `delta`, like `lse`: what the gradients of all scores of a query have in common."""
    batch, heads, length, head_dim = out.shape
    strides = (row_strides(grad_out), row_strides(out))
    arguments = (grad_out, out, lse, grad_lse, delta, *strides, heads, length)
    rows = min(64, ROW_ELEMENTS // padded_head_dim(head_dim))
    constants = {
        "HAS_GRAD_LSE": grad_lse is not None,
        "SUM": sum_dtype(out),
        "BLOCK_M": rows,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
    }
    programs = batch * heads * triton.cdiv(length, rows)
    launch.run(row_sums, programs, arguments, constants)


def query_gradient(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor
) -> None:
    """Write the gradient of the queries; `delta` is what `row_sums` computes."""
    tile = _choose("backward_queries", call, call.geometry.q_tile, call.geometry.k_tile)
    order = heavy_first(call.counts, call.indices.shape[-1])
    batch, heads = call.q.shape[:2]
    arguments = (
        *(call.q, call.k, call.v, grad_out, lse, delta, grad_q),
        *(call.indices, call.counts, order, call.key_mask),
        *map(row_strides, (call.q, call.k, call.v, grad_out, grad_q)),
        *list_strides(call.indices),
        *list_strides(order),
        *_integers(call, call.geometry.q_blocks, heads),
    )
    launch.run(
        attention_backward_queries,
        batch * heads * call.geometry.q_blocks * _chunks(call.geometry.q_tile, tile.own),
        arguments,
        _constants(call, tile, grad_out, grad_q, rows=tile.own, columns=tile.other),
        warps=tile.warps,
        stages=tile.stages,
    )


def key_gradients(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Write the gradients of keys and values; `delta` is what `row_sums` computes."""
    tile = _choose("backward_keys", call, call.geometry.k_tile, call.geometry.q_tile)
    entries, starts = transpose_lists(call.indices, call.counts, call.geometry.k_blocks)
    batch, heads = call.k.shape[:2]
    lengths = starts.diff()
    if call.q.shape[1] != heads and lengths.shape[1] > 1:
        # A program walks the lists of all query heads of its key head.
        lengths = lengths.unflatten(1, (heads, -1)).sum(2, dtype=torch.int32)
        most = call.geometry.q_blocks * (call.q.shape[1] // heads)
    else:
        most = call.geometry.q_blocks
    order = heavy_first(lengths.contiguous(), most)
    arguments = (
        *(call.q, call.k, call.v, grad_out, lse, delta, grad_k, grad_v),
        *(entries, starts, order, call.key_mask),
        *map(row_strides, (call.q, call.k, call.v, grad_out, grad_k, grad_v)),
        *list_strides(entries),
        *list_strides(starts),
        *list_strides(order),
        *_integers(call, call.geometry.k_blocks, heads),
    )
    launch.run(
        attention_backward_keys,
        batch * heads * call.geometry.k_blocks * _chunks(call.geometry.k_tile, tile.own),
        arguments,
        _constants(call, tile, grad_out, grad_k, grad_v, rows=tile.other, columns=tile.own),
        warps=tile.warps,
        stages=tile.stages,
    )


def _choose(kernel: str, call: Call, own: Sides, other: Sides) -> Tile:
    sizes = math.prod(own), math.prod(other)
    chip = tuning.current_chip()
    return tuning.choose(kernel, chip, product_kind(call.q.dtype), call.q.shape[-1], *sizes)


def product_kind(dtype: torch.dtype) -> str:
    """Return which of `tuning.KINDS` products of a dtype are."""
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if product_precision(dtype) == "tf32" else "float32"


def row_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor but for the last one, which is 1."""
    return tensor.stride()[:-1]


def list_strides(lists: Tensor) -> tuple[int, ...]:
    """Like `row_strides`, and 0 along batch entries or heads where one list holds for all."""
    strides = lists.stride()[:-1]
    shared = tuple(0 if lists.shape[axis] == 1 else strides[axis] for axis in (0, 1))
    return shared + strides[2:]


def _integers(call: Call, rows: int, heads: int) -> tuple[Any, ...]:
    """The run-time scalars of the attention kernels, in their order."""
    q, k, geometry = call.q, call.k, call.geometry
    groups = q.shape[1] // k.shape[1]
    lengths = (q.shape[2], k.shape[2], geometry.before, geometry.behind)
    grids = (*geometry.q_grid, *geometry.k_grid)
    return (call.scale, rows, heads, groups, *lengths, *grids)


def _constants(call: Call, tile: Tile, *others: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """The compile-time arguments of the attention kernels.

    Args:
        call: The call.
        tile: How programs are cut.
        *others: Tensors with rows, beside those of the call.
        rows: Rows of queries at a step.
        columns: Rows of keys at a step.
    """
    geometry = call.geometry
    return {
        "SUM": sum_dtype(call.q),
        "Q_TILE": geometry.q_tile,
        "K_TILE": geometry.k_tile,
        "HAS_TEXT": geometry.before + geometry.behind > 0,
        "HAS_MASK": call.key_mask is not None,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "HEAD_DIM": call.q.shape[-1],
        "BLOCK_D": padded_head_dim(call.q.shape[-1]),
        "Q_CHUNKS": _chunks(geometry.q_tile, rows),
        "K_CHUNKS": _chunks(geometry.k_tile, columns),
        "JOINED": tile.joined,
        "K_FULL": all_keys_valid(call, columns) and not tile.joined,
        "WIDE": any(map(needs_wide_addresses, (call.q, call.k, call.v, *others))),
        "PRECISION": product_precision(call.q.dtype),
    }


def all_keys_valid(call: Call, columns: int) -> bool:
    """Whether every slot of every key block holds a key that may be seen."""
    grid, tile = call.geometry.k_grid, call.geometry.k_tile
    divides = all(extent % side == 0 for extent, side in zip(grid, tile, strict=True))
    has_text = call.geometry.before + call.geometry.behind > 0
    return divides and math.prod(tile) % columns == 0 and not has_text and call.key_mask is None


def _chunks(tile: Sides, rows: int) -> int:
    return -(-math.prod(tile) // rows)


def padded_head_dim(head_dim: int) -> int:
    """Return how many columns the kernels hold for a head size."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def needs_wide_addresses(tensor: Tensor) -> bool:
    """Whether an element is too far from the beginning of its head for 32 bits."""
    length, head_dim = tensor.shape[2:]
    return (length - 1) * tensor.stride(2) + head_dim > _ADDRESS_LIMIT


def sum_dtype(tensor: Tensor) -> Any:
    """Return the dtype, in Triton, of sums over values of a tensor."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def product_precision(dtype: torch.dtype) -> str:
    """Follow torch's switch for float32 products; the other dtypes know one precision only."""
    allowed = dtype == torch.float32 and torch.version.hip is None
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
