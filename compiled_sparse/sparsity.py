"""How many tiles a sparsity keeps, and how it grows while a model is trained.

Plain float arithmetic on purpose: models were trained with these rules, rounding included. Nothing
here imports torch.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from compiled_sparse.errors import MetadataError

RATIO_DIGITS = 12
"""Decimal places of the share that a sparsity leaves."""


def num_selected(num_tiles: int, sparsity: float) -> int:
    """Return how many of a row's tiles are attended: ceil((1 - sparsity) * num_tiles), at least 1.

    The product is rounded as a Python float, which shows: 0.7 of 10 tiles leaves 4, not 3.

    Args:
        num_tiles: Number of key tiles, partial ones included.
        sparsity: Fraction of the tiles to leave out.

    Returns:
        A number from 1 to `num_tiles`.

    Raises:
        MetadataError: if there is no tile, or the sparsity is not from 0 to 1.
    """
    _require("num_tiles", num_tiles, _is_integer(num_tiles, 1), "an integer of at least 1")
    _require("sparsity", sparsity, _is_share(sparsity), "a number from 0 to 1")
    return max(1, min(math.ceil((1.0 - float(sparsity)) * num_tiles), num_tiles))


def truncated_top_k(num_blocks: int, ratio: float) -> int:
    """Return how many of a row's blocks are attended: ratio * num_blocks cut off, at least 1.

    The product is rounded as a Python float, which shows: 0.29 of 100 blocks are 28, not 29. That
    one block is left where the published rule leaves none is a deviation: none gives NaN.

    Args:
        num_blocks: Number of key blocks, partial ones included.
        ratio: Share of the blocks to keep.

    Returns:
        A number from 1 to `num_blocks`.

    Raises:
        MetadataError: if there is no block, or the ratio is not from 0 to 1.
    """
    _require("num_blocks", num_blocks, _is_integer(num_blocks, 1), "an integer of at least 1")
    _require("ratio", ratio, _is_share(ratio), "a number from 0 to 1")
    return max(1, min(int(float(ratio) * num_blocks), num_blocks))


def ratio_at(sparsity: float) -> float:
    """Return the share to keep at a sparsity, free of the rounding of 1 - sparsity.

    Without that 0.9 would leave less than 0.1, which is cut off to one block less. A share too
    small for its digits stays what it is: it is not none.
    """
    return round(1.0 - sparsity, RATIO_DIGITS) or 1.0 - sparsity


def sparsity_ramp(step: int, *, target: float, rate: float = 0.01, interval: int = 1) -> float:
    """Return the sparsity of a training step: `rate` more every `interval` steps, up to `target`.

    Args:
        step: Number of training steps done before this one.
        target: The sparsity to reach and then keep.
        rate: By how much the sparsity grows at a time.
        interval: Steps between two such increases.

    Raises:
        MetadataError: if an argument is out of range.
    """
    _require("step", step, _is_integer(step, 0), "an integer of at least 0")
    _require("target", target, _is_share(target), "a number from 0 to 1")
    _require("rate", rate, _is_share(rate) and rate > 0, "a number above 0, at most 1")
    _require("interval", interval, _is_integer(interval, 1), "an integer of at least 1")
    return min(float(target), float(rate) * (step // interval))


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= 1


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise MetadataError(
            f"{name} is out of range",
            got=repr(value),
            expected=expected,
            next_step=f"pass {name} as {expected}",
        )
