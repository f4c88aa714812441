"""Checks of sparse calls as further outputs of a graph: what a guard reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compiled_sparse.ops import guard as _op  # noqa: F401 - defines the op
from compiled_sparse.passes.exchanges import exchange_before
from compiled_sparse.passes.further_outputs import FurtherOutputs
from compiled_sparse.passes.fx import call
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value

_OPS = torch.ops.compiled_sparse


def add_check(
    outputs: FurtherOutputs, path: str, owner: fx.GraphModule, out: fx.Node, rows: int
) -> None:
    """Check a sparse call's output; one in a graph that hands nothing out is not checked.

    Args:
        outputs: Where the statistics are handed out, under the path.
        path: The module that made the call.
        owner: Graph module whose graph holds it.
        out: The output, first of what the mechanism's op returns.
        rows: How many query positions to compare.
    """
    call = out.args[0]
    assert isinstance(call, fx.Node)
    q, k, v, key_mask, *_, scale = call.args
    arguments = (q, k, v, out, key_mask, rows, scale)
    with owner.graph.inserting_after(out):
        statistics = owner.graph.call_function(_OPS.guard_statistics.default, arguments)
    with example_value(out).fake_mode:
        statistics.meta["example_value"] = compute(statistics)
    outputs.hand_out(path, owner, _of_all_ranks(q, statistics))


def _of_all_ranks(query: Any, statistics: fx.Node) -> fx.Node:
    """Sum what ranks with some of the heads found, so that all of them judge alike."""
    exchange = exchange_before(query)
    if exchange is None:
        return statistics
    with statistics.graph.inserting_after(statistics):
        return call(_OPS.sum_over_ranks.default, statistics, exchange.group.name)
