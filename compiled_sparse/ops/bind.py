"""Markers: ops without a result that carry a module's own tensors and settings into the graph.

They compute nothing. The compile backend reads and erases them; any other compiler removes them as
dead code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.library import register_fake

from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE

LIBRARY.define(
    "bind(Tensor layer, Tensor[] gate, str gate_name, Tensor[] projection, str projection_name, "
    "str config) -> ()"
)
LIBRARY.define("bind_layout(Tensor anchor, SymInt[] grid) -> ()")


def _bind(
    layer: Tensor,
    gate: list[Tensor],
    gate_name: str,
    projection: list[Tensor],
    projection_name: str,
    config: str,
) -> None:
    """Do nothing: what counts is that the arguments are in the graph."""


def _bind_layout(anchor: Tensor, grid: Sequence[int]) -> None:
    """Do nothing: what counts is that the arguments are in the graph."""


LIBRARY.impl("bind", _bind, "CompositeExplicitAutograd")
register_fake(f"{NAMESPACE}::bind", _bind, lib=LIBRARY)
LIBRARY.impl("bind_layout", _bind_layout, "CompositeExplicitAutograd")
register_fake(f"{NAMESPACE}::bind_layout", _bind_layout, lib=LIBRARY)
