"""A model's own Ulysses exchanges, as those of diffusers' context parallelism, recognised.

Queries, keys and values that each come out of an all-to-all, and an output that goes into one, are
followed step by step: only what provably moves the heads of rank r to rank r, and the runs of the
sequence together in rank order, is replaced. The three exchanges in front of the call become one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.distributed.meeting import process_group_of
from compiled_sparse.passes.exchanges import can_travel_together
from compiled_sparse.passes.exchanges import put_around
from compiled_sparse.passes.fx import all_nested
from compiled_sparse.passes.fx import call
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.sdpa import arguments_of
from compiled_sparse.passes.sdpa import is_sdpa
from compiled_sparse.passes.ulysses_paths import Path
from compiled_sparse.passes.ulysses_paths import way_back
from compiled_sparse.passes.ulysses_paths import way_in
from compiled_sparse.passes.writes import reached_by_writes
from compiled_sparse.passes.writes import shared_at_run_time
from compiled_sparse.passes.writes import writes
from compiled_sparse.sharding import SequenceGroup


def replace_exchanges(owner: fx.GraphModule) -> list[fx.GraphModule]:
    """Replace the Ulysses exchanges around the attention calls of a graph by this package's.

    Args:
        owner: Graph module, edited; those nested in it, too.

    Returns:
        The graph modules that changed and need recompiling.
    """
    edited = []
    for module in (owner, *all_nested(owner)):
        replaced = [_replace(node, module) for node in list(module.graph.nodes) if is_sdpa(node)]
        if any(replaced):
            edited.append(module)
    return edited


def _replace(node: fx.Node, owner: fx.GraphModule) -> bool:
    arguments = arguments_of(node)
    if not isinstance(example_value(node), FakeTensor):
        return False  # inside a function transform
    found = [way_in(arguments[name]) for name in ("query", "key", "value")]
    back = way_back(node)
    paths = [path for path in (*found, back) if path is not None]
    if len(paths) < 4 or len({(path.group, path.size) for path in paths}) > 1:
        return False
    *ways_in, out_way = paths
    group = _group_of(out_way)
    query = shape_of(arguments["query"]) or ()
    lengths = [(shape_of(arguments[name]) or ())[2:3] for name in ("key", "value")]
    is_lasting = any(path.goes_on for path in (*ways_in, out_way))
    if group is None or is_lasting or any(length != query[2:3] for length in lengths):
        return False
    if not can_travel_together(*(path.nodes[0] for path in ways_in)):
        return False
    if any(_is_written(path, node, owner) for path in ways_in):
        return False
    with node.graph.inserting_before(node):
        first, second, third = (_with_heads_first(path) for path in ways_in)
        rows = query[2] if isinstance(query[2], int) else _all_rows(first, group.size)
    end = out_way.nodes[-1]
    users = list(end.users)
    out = put_around(node, (first, second, third), group, rows)
    with node.graph.inserting_before(out.next):
        if not out_way.heads_first:
            out = call(torch.transpose, out, 1, 2)
        out = call(torch.ops.aten.contiguous.default, out)
    for user in users:
        user.replace_input_with(end, out)
    _erase(path.nodes for path in (out_way, *ways_in))
    return True


def _is_written(path: Path, call: fx.Node, owner: fx.GraphModule) -> bool:
    """Whether memory on the way to a call is written to: the call would read it too late."""
    between = [path.nodes[0].next]
    while between[-1] is not call:
        between.append(between[-1].next)
    writers = [each for each in between[:-1] if writes(each, owner)]
    if not writers:
        return False
    memory = {storage for node in path.nodes for storage in storage_of(node)}
    reached = reached_by_writes(memory, shared_at_run_time(owner))
    return any(reached & storage_of(given) for each in writers for given in each.all_input_nodes)


def _group_of(path: Path) -> SequenceGroup | None:
    group = process_group_of(path.group)
    fits = group.size() == path.size
    return SequenceGroup(path.group, path.size, group.rank()) if fits else None


def _with_heads_first(path: Path) -> fx.Node:
    local = path.nodes[0]
    return local if path.heads_first else call(torch.transpose, local, 1, 2)


def _all_rows(local: fx.Node, size: int) -> fx.Node:
    return call(operator.mul, call(torch.ops.aten.sym_size.int, local, 2), size)


def _erase(paths: Iterable[tuple[fx.Node, ...]]) -> None:
    """Erase the steps nobody reads any more; the ends at the model's side stay."""
    for nodes in paths:
        for node in reversed(nodes):
            if not node.users and node.op != "placeholder" and not is_sdpa(node):
                node.graph.erase_node(node)
