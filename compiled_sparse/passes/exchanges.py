"""Exchanges around an attention call whose tokens are divided among processes.

Between them the call is one of all tokens and some of the heads, as if nothing were divided: it is
decided and rewritten like any other, and stays right where it stays dense.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.ops import ulysses as _op  # noqa: F401 - defines the ops
from compiled_sparse.passes.fx import all_nested
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.mask_nodes import COPIED_META
from compiled_sparse.passes.rings import rings_in
from compiled_sparse.passes.sdpa import INPUTS
from compiled_sparse.passes.sdpa import replace_inputs
from compiled_sparse.sharding import HeadShare
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.sharding import head_shares

_OPS = torch.ops.compiled_sparse
_SCATTER = _OPS.scatter_heads.default
GRID = "compiled_sparse_grid"
"""Key of a node's meta: token grid of the whole video, where the caller said so."""


@dataclass(frozen=True)
class Exchange:
    """The exchange in front of a call.

    Args:
        node: The call of `scatter_heads`.
        group: The processes.
        num_heads: Query heads of all of them.
        num_key_heads: Key heads of all of them.
    """

    node: fx.Node
    group: SequenceGroup
    num_heads: int
    num_key_heads: int

    @property
    def local(self) -> dict[str, fx.Node]:
        """Queries, keys and values of this rank's tokens."""
        tensors: Any = self.node.args[0]
        return dict(zip(INPUTS, tensors, strict=False))

    @property
    def shares(self) -> tuple[HeadShare, ...]:
        """The heads of each rank."""
        return head_shares(self.num_heads, self.num_key_heads, self.group.size)

    @property
    def heads(self) -> tuple[int, int]:
        """The query heads this rank computes."""
        return self.shares[self.group.rank].computed

    def carry(self, tensor: fx.Node) -> fx.Node:
        """Send one more tensor along.

        Args:
            tensor: [batch, query heads, rows, head_dim] of this rank's tokens, in front of the
                exchange.

        Returns:
            [batch, this rank's heads, length, head_dim] of all tokens.
        """
        tensors: Any = self.node.args[0]
        self.node.args = ([*tensors, tensor], *self.node.args[1:])
        self.node.meta["example_value"] = _computed(self.node, tensor)
        return _item(self.node, len(tensors))


def exchange_before(query: fx.Node) -> Exchange | None:
    """Return the exchange that a call's queries come out of, if they do."""
    source = query.args[0] if query.target is operator.getitem else None
    if not isinstance(source, fx.Node) or source.target is not _SCATTER:
        return None
    arguments: Any = source.args
    tensors, name, size, rank, *_ = arguments
    heads, key_heads = (hint(example_value(each).shape[1]) for each in tensors[:2])
    return Exchange(source, SequenceGroup(name, size, rank), heads, key_heads)


def exchanges_in(owner: fx.GraphModule) -> dict[SequenceGroup, list[str]]:
    """Return what is exchanged in a graph and those nested in it, by group, in words.

    The words are the same on every rank that computes the same.
    """
    found: dict[SequenceGroup, list[str]] = {}
    for module in (owner, *all_nested(owner)):
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target in (_SCATTER, _OPS.scatter_heads):
                tensors, name, size, rank, num_video, *text = node.args
                batch, heads, rows, width = map(hint, example_value(tensors[0]).shape)
                words = (
                    f"{len(tensors)} tensors of {batch} x {heads} heads x {rows} rows x {width}, "
                    f"{_number(num_video)} tokens of video, {tuple(map(_number, text))} of text"
                )
                found.setdefault(SequenceGroup(name, size, rank), []).append(words)
        for group, words in rings_in(module.graph):
            found.setdefault(group, []).append(words)
    return found


def _number(size: Any) -> int:
    return hint(example_value(size) if isinstance(size, fx.Node) else size)


def can_travel_together(query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    """Whether an exchange takes these: of one batch and head size, values with the keys' heads.

    Args:
        query: Queries of four dimensions, the last one the head size, the first one the batch.
        key: Keys.
        value: Values.
    """
    shapes = [example_value(each).shape for each in (query, key, value)]
    of_query, of_key, of_value = shapes
    are_alike = all(same(each[dim], of_query[dim]) for each in shapes for dim in (0, 3))
    return are_alike and all(map(same, of_key, of_value))


def put_around(
    call: fx.Node,
    local: tuple[fx.Node, fx.Node, fx.Node],
    group: SequenceGroup,
    num_video: int | fx.Node,
    text: tuple[int, int] = (0, 0),
    *,
    grid: tuple[int, ...] | None = None,
) -> fx.Node:
    """Put exchanges around a call of `scaled_dot_product_attention`.

    Args:
        call: The call; its queries, keys and values are replaced.
        local: Queries, keys and values of this rank's tokens, [batch, heads, rows, head_dim].
        group: The processes.
        num_video: Tokens of the whole video, as a node where it is symbolic.
        text: Rows of text in front of the video's and behind them.
        grid: Token grid of the whole video, where the caller said so.

    Returns:
        [batch, query heads, rows, head_dim], the output for this rank's tokens, put behind the call
        and not used yet.
    """
    processes = (group.name, group.size, group.rank)
    with call.graph.inserting_before(call):
        scatter = call.graph.call_function(_SCATTER, (list(local), *processes, num_video, *text))
    _describe(call, scatter, local[0])
    scatter.meta[GRID] = grid
    items = [_item(scatter, i) for i in range(3)]
    replace_inputs(call, items)
    key_heads = hint(example_value(local[1]).shape[1])
    with call.graph.inserting_after(call):
        arguments = (call, local[0], key_heads, *processes, *text)
        gather = call.graph.call_function(_OPS.gather_heads.default, arguments)
    dtype = example_value(call).dtype  # under autocast not that of the queries
    call.meta["example_value"] = _computed(call, local[0]).to(dtype)
    _describe(call, gather, local[0])
    return gather


def _item(scatter: fx.Node, index: int) -> fx.Node:
    with scatter.graph.inserting_after(_last_item(scatter)):
        item = scatter.graph.call_function(operator.getitem, (scatter, index))
    item.meta.update({k: scatter.meta[k] for k in COPIED_META if k in scatter.meta})
    item.meta["example_value"] = example_value(scatter)[index]
    return item


def _last_item(scatter: fx.Node) -> fx.Node:
    node = scatter
    while node.next.target is operator.getitem and node.next.args[0] is scatter:
        node = node.next
    return node


def _describe(call: fx.Node, node: fx.Node, like: fx.Node) -> None:
    node.meta.update({k: call.meta[k] for k in COPIED_META if k in call.meta})
    node.meta["example_value"] = _computed(node, like)


def _computed(node: fx.Node, like: fx.Node) -> Any:
    """What a node gives, in the mode of another's fake tensor: constants it makes are fake, too."""
    with example_value(like).fake_mode:
        return compute(node)
