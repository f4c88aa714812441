"""From what a mask holds to what it means: which keys are padding, and which queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.passes.fx import same
from compiled_sparse.passes.mask_values import Atom
from compiled_sparse.passes.mask_values import MaskValue
from compiled_sparse.passes.mask_values import make_value
from compiled_sparse.passes.mask_values import moved
from compiled_sparse.passes.mask_values import spread

BATCH, HEAD, QUERY, KEY = range(4)
HIDING_BIAS = -9000.0
"""A finite bias at most this hides a key: it is -10000 in the lowest precision, with room."""


@dataclass(frozen=True)
class MaskForm:
    """A mask proven to say which keys are seen, and perhaps which queries see anything.

    Args:
        keys: Boolean content over batch and key: attended or not; None where all are.
        queries: Boolean content over batch and query: sees the attended keys or none; None where
            all do.
        keeps_empty: A sequence without any attended key attends to all of them, as a finite bias
            on every key is none at all.
    """

    keys: MaskValue | None
    queries: MaskValue | None = None
    keeps_empty: bool = False

    @property
    def hides_nothing(self) -> bool:
        """Whether every query provably sees every key."""
        return self.keys is None and self.queries is None

    @property
    def name(self) -> str:
        """The word for it in reports."""
        if self.hides_nothing:
            return "all_true"
        return "key_padding" if self.queries is None else "query_and_key_padding"


def find_form(
    value: MaskValue | None, dtype: torch.dtype, shape: Sequence[Any], full: Sequence[Any]
) -> MaskForm | str:
    """Prove what a mask means.

    Args:
        value: Its content.
        dtype: Its dtype.
        shape: Its shape.
        full: What it is broadcast to: batch, heads, queries, keys.

    Returns:
        The form, or in words why there is none.
    """
    offset = 4 - len(shape)
    wanted = zip(shape, full[offset:], strict=True) if offset >= 0 else ()
    if offset < 0 or not all(same(size, 1) or same(size, want) for size, want in wanted):
        return "it does not broadcast to [batch, heads, queries, keys]"
    if value is None:
        return f"an additive {_name(dtype)} mask whose values are not known; {_ADVICE}"
    visible = _visible(value)
    if isinstance(visible, str):
        return visible
    if any(axis.divisor != 1 for atom in visible.atoms for axis in atom.axes):
        return f"it repeats a mask of other tokens; {_ADVICE}"
    visible = moved(visible, {dim: dim + offset for dim in visible.dims})
    if HEAD in visible.dims:
        return f"it differs from head to head; {_ADVICE}"
    is_finite = any(number not in (0.0, float("-inf")) for number in value.values)
    return _factored(visible, is_finite and dtype != torch.bool)


_ADVICE = "pass a bool mask [batch, 1, 1, keys], True where a key is attended"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _visible(value: MaskValue) -> MaskValue | str:
    """Where a mask lets through, or why it is no mask but a bias."""
    table = value.table
    if table.dtype == torch.bool:
        return value
    visible = table == 0
    hiding = [number for number in value.values if number != 0]
    if len(hiding) > 1 or any(number > HIDING_BIAS for number in hiding):
        numbers = " and ".join(f"{number:g}" for number in value.values)
        return f"an additive mask of {numbers}, not of 0 and one number below {HIDING_BIAS:g}"
    result = make_value(value.atoms, visible)
    assert result is not None
    return result


def _factored(visible: MaskValue, is_finite: bool) -> MaskForm | str:
    """Write the content as (query is valid) and (key is valid), if that is what it is."""
    of_query = [atom for atom in visible.atoms if QUERY in atom.dims]
    of_key = [atom for atom in visible.atoms if QUERY not in atom.dims]
    if any(KEY in atom.dims for atom in of_query):
        return f"which keys are seen differs from query to query; {_ADVICE}"
    rows = spread(visible, [*of_query, *of_key]).reshape(2 ** len(of_query), -1)
    filled = rows[rows.any(1)]
    if len(filled) == 0:
        return "it hides every key"
    if not bool((filled == filled[0]).all()):
        return f"which keys are seen differs from query to query; {_ADVICE}"
    keys = _content(of_key, filled[0])
    queries = _content(of_query, rows.any(1))
    if queries is None:
        return MaskForm(keys, keeps_empty=is_finite)
    if keys is None:
        return f"it hides queries, not keys; {_ADVICE}"
    if is_finite:
        return f"an additive mask that hides whole queries; {_ADVICE}"
    return MaskForm(keys, queries)


def _content(atoms: list[Atom], flat: Tensor) -> MaskValue | None:
    """A boolean content, None if it is true everywhere."""
    value = make_value(atoms, flat.reshape([2] * len(atoms)))
    return value if value is not None and value.atoms else None
