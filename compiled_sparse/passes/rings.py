"""Attention calls whose keys go round a ring of processes.

While a graph is decided, such a call looks as if this process had all tokens: its inputs go
through `compiled_sparse::ring_whole`, which is there for its shape alone. Afterwards nothing of
that is left: the call has become ring attention, dense or sparse, over the tokens at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.ring import ring_arguments
from compiled_sparse.distributed.ring import ring_pattern
from compiled_sparse.distributed.ring import ring_refusal
from compiled_sparse.layout import Text
from compiled_sparse.ops import ring_shapes as _op  # noqa: F401 - defines the ops
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.mask_nodes import COPIED_META
from compiled_sparse.passes.sdpa import INPUTS
from compiled_sparse.passes.sdpa import arguments_of
from compiled_sparse.passes.sdpa import replace_inputs
from compiled_sparse.sharding import SequenceGroup

_OPS = torch.ops.compiled_sparse
_RING = "compiled_sparse_ring"


@dataclass(frozen=True)
class Ring:
    """A call in a ring.

    Args:
        group: The processes.
        grid: Token grid of the whole video.
        text: Text on every one.
    """

    group: SequenceGroup
    grid: tuple[int, ...]
    text: Text

    def refusal(self, config: MechanismConfig) -> str | None:
        """Return why a mechanism cannot go round it, or None."""
        return ring_refusal(config, size=self.group.size, grid_thw=self.grid, text=self.text)


def pretend(call: fx.Node, ring: Ring) -> None:
    """Let a call look as if this process had all tokens.

    Args:
        call: A call of `scaled_dot_product_attention` without a mask.
        ring: Its ring.
    """
    arguments, sizes = arguments_of(call), (ring.text.before, ring.text.after)
    number = math.prod(ring.grid)
    local = [arguments[name] for name in INPUTS]
    with call.graph.inserting_before(call):
        whole = [
            _described(call, call.graph.call_function(_OPS.ring_whole.default, (x, number, *sizes)))
            for x in local
        ]
    for node in (call, *whole):
        node.meta[_RING] = ring
    replace_inputs(call, whole)
    users, dtype = list(call.users), example_value(call).dtype
    with example_value(local[0]).fake_mode:
        call.meta["example_value"] = compute(call).to(dtype)
    with call.graph.inserting_after(call):
        own = call.graph.call_function(_OPS.ring_own.default, (call, local[0]))
    _described(call, own)
    for user in users:
        user.replace_input_with(call, own)


def ring_of(call: fx.Node) -> Ring | None:
    """Return the ring a call is in, if it is in one."""
    ring: Ring | None = call.meta.get(_RING)
    return ring


def settle(call: fx.Node, ring: Ring, config: MechanismConfig | None) -> fx.Node:
    """Make a call what it is: ring attention over the tokens at hand.

    Args:
        call: A call that `pretend` was called for.
        ring: Its ring.
        config: The mechanism, or None for dense attention.

    Returns:
        The output.
    """
    arguments = arguments_of(call)
    whole = [arguments[name] for name in INPUTS]
    (own,) = call.users
    given = ring_arguments(
        ring_pattern(config or Dense(), ring.grid, ring.group.size), ring.group, ring.text
    )
    inputs = (*(each.args[0] for each in whole), None, *given, arguments["scale"])
    with call.graph.inserting_before(call):
        out = call.graph.call_function(_OPS.ring_attention.default, inputs)
    _described(call, out)
    own.replace_all_uses_with(out)
    for node in (own, call, *whole):
        node.graph.erase_node(node)
    return out


def rings_in(graph: fx.Graph) -> list[tuple[SequenceGroup, str]]:
    """Return what goes round in a graph: the group and what it is, in words all ranks agree in."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _OPS.ring_attention.default:
            given: Any = node.args
            kind, grid, tile, windows, size, rank, name, *text = given[4:13]
            shape = tuple(map(int, example_value(given[0]).shape))
            words = f"ring of {kind} {windows}, tile {tile}, grid {grid}, text {text}, q {shape}"
            found.append((SequenceGroup(name, size, rank), words))
    return found


def _described(call: fx.Node, node: fx.Node) -> fx.Node:
    node.meta.update({k: call.meta[k] for k in COPIED_META if k in call.meta})
    tensor: Any = node.all_input_nodes[0]
    with example_value(tensor).fake_mode:
        node.meta["example_value"] = compute(node)
    return node
