"""Host side of the forward that fetches boxes: when it can be used, and its descriptors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compiled_sparse.kernels import tuning

if TYPE_CHECKING:
    from compiled_sparse.kernels.attention import Call
    from compiled_sparse.kernels.attention import Sides

_ALIGNMENT = 16
_MAX_BOX_SIDE = 256


def takes_boxes(call: Call, chip: str) -> bool:
    """Return whether the bulk copy engine can fetch the key blocks of a call.

    It needs tiles with sides that are powers of two, aligned rows, elements of two bytes and no key
    mask (masked values could be NaN, which a weight of zero does not remove).
    """
    sides = call.geometry.k_tile
    return (
        chip in tuning.BULK_COPY_CHIPS
        and call.key_mask is None
        and call.q.element_size() == 2
        and all(_is_power_of_two(side) and side <= _MAX_BOX_SIDE for side in sides)
        and math.prod(sides) >= 16
        and all(_is_aligned(tensor) for tensor in (call.k, call.v))
    )


def box_of(tile: Sides, rows: int) -> Sides:
    """Return the box of at most `rows` rows that a tile is fetched in, cut along slow axes."""
    sides = list(tile)
    for axis in range(3):
        while math.prod(sides) > rows and sides[axis] > 1:
            sides[axis] //= 2
    t, h, w = sides
    return t, h, w


def descriptors(call: Call, batch: int, box: Sides, block_d: int) -> Iterator[TensorDescriptor]:
    """Yield descriptors of the grid tokens of the keys and of the values of one batch entry."""
    _, h, w = call.geometry.k_grid
    for tensor in (call.k, call.v):
        grid = tensor[batch, :, call.geometry.before :]
        head, token, _ = grid.stride()
        shape = [grid.shape[0], *call.geometry.k_grid, grid.shape[2]]
        strides = [head, h * w * token, w * token, token, 1]
        yield TensorDescriptor(grid, shape, strides, [1, *box, block_d])


def _is_power_of_two(side: int) -> bool:
    return side & (side - 1) == 0


def _is_aligned(tensor: Tensor) -> bool:
    item = tensor.element_size()
    strides = [stride * item for stride in tensor.stride()[:-1]]
    aligned = all(stride % _ALIGNMENT == 0 for stride in strides)
    # A head that stands for all of them has stride 0, which no box can have.
    return aligned and min(strides[1:]) > 0 and tensor.data_ptr() % _ALIGNMENT == 0
