"""Which hidden states feed an attention call: what its inputs are projected from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.tracks import Track

_PROJECTIONS = frozenset({"linear", "matmul"})


@dataclass(frozen=True)
class HiddenState:
    """Input of projections that lead to the queries, the keys and the values of one call.

    Args:
        node: [batch, tokens, channels].
        tokens: What its tokens are.
        is_of_batch: Whether it provably is of the queries' batch members.
    """

    node: fx.Node
    tokens: Track
    is_of_batch: bool


def projected(*results: fx.Node) -> tuple[fx.Node, ...]:
    """Return the tensors [batch, tokens, channels] that all of some nodes are projected from.

    Args:
        results: Queries, keys and values.
    """
    inputs = [dict.fromkeys(_nearest_inputs(node)) for node in results]
    return tuple(node for node in inputs[0] if all(node in each for each in inputs))


def _nearest_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the inputs of the projections met first on the way back from a node."""
    seen: set[fx.Node] = set()
    rest = [node]
    while rest:
        each = rest.pop()
        if each in seen:
            continue
        seen.add(each)
        source = each.args[0] if op_name(each) in _PROJECTIONS and each.args else None
        if isinstance(source, fx.Node):
            if len(shape_of(source) or ()) == 3:
                yield source
        else:
            rest += each.all_input_nodes
