"""Writing mask contents back into a graph as few and small nodes."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.mask_forms import BATCH
from compiled_sparse.passes.mask_values import Atom
from compiled_sparse.passes.mask_values import MaskValue

COPIED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


class NodeWriter:
    """Inserts calls in front of a node, with the metadata the inner compilers read.

    Args:
        before: The node.
        tensor: A fake tensor of the same graph.
    """

    def __init__(self, before: fx.Node, tensor: FakeTensor) -> None:
        self.before = before
        self.mode = tensor.fake_mode

    def call(self, function: Any, *arguments: Any) -> fx.Node:
        """Insert one call."""
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_function(function, arguments)
        with self.mode:
            values = fx.node.map_arg(arguments, example_value)
            node.meta["example_value"] = function(*values)
        copied = {k: self.before.meta[k] for k in COPIED_META if k in self.before.meta}
        node.meta.update(copied)
        return node

    def expanded(self, node: fx.Node, like: fx.Node, dims: Sequence[int]) -> fx.Node:
        """Broadcast a node to the sizes some dimensions of another have."""
        shape = [example_value(like).shape[dim] for dim in dims]
        before = shape_of(node) or ()
        if all(same(size, want) for size, want in zip(before, shape, strict=True)):
            return node
        sizes = [
            size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, like, dim)
            for size, dim in zip(shape, dims, strict=True)
        ]
        return self.call(torch.broadcast_to, node, sizes)


def can_be_written(content: MaskValue, graph: fx.Graph) -> bool:
    """Whether the tensors a content is made of can be read in a graph, at small cost."""
    return len(content.atoms) <= 2 and all(a.leaf.node.graph is graph for a in content.atoms)


def write_content(writer: NodeWriter, content: MaskValue, sequence_dim: int) -> fx.Node:
    """Write a boolean content over batch and a sequence as nodes.

    Args:
        writer: Where to.
        content: In the dimensions of a [batch, heads, queries, keys] mask.
        sequence_dim: Which of them the sequence is.

    Returns:
        A node of shape [batch or 1, sequence or 1].
    """
    literals = [_literal(writer, atom, sequence_dim) for atom in content.atoms]
    wanted = bool(content.table.sum() * 2 <= content.table.numel())
    terms = [
        functools.reduce(
            lambda left, right: writer.call(operator.and_, left, right),
            [
                literal if bit else writer.call(torch.logical_not, literal)
                for literal, bit in zip(literals, bits, strict=True)
            ],
        )
        for bits in itertools.product((False, True), repeat=len(literals))
        if bool(content.table[tuple(map(int, bits))]) == wanted
    ]
    result = functools.reduce(lambda left, right: writer.call(operator.or_, left, right), terms)
    return result if wanted else writer.call(torch.logical_not, result)


def _literal(writer: NodeWriter, atom: Atom, sequence_dim: int) -> fx.Node:
    """Write one bit as a [batch or 1, sequence or 1] tensor."""
    node = atom.leaf.node
    value: Tensor = example_value(node)
    if value.dtype != torch.bool:
        node = writer.call(torch.eq, node, atom.leaf.true_value)
    index = tuple(0 if same(size, 1) else slice(None) for size in value.shape)
    dims = [axis.dim for axis in atom.axes]
    if dims == [BATCH, sequence_dim] and len(index) == 2:
        return node
    if dims == [sequence_dim, BATCH]:
        node = writer.call(operator.getitem, node, index) if 0 in index else node
        return writer.call(torch.transpose, node, 0, 1)
    missing = {(): (None, None), (BATCH,): (None,), (sequence_dim,): ()}.get(tuple(dims), ())
    leading = (None,) if dims == [sequence_dim] else ()
    return writer.call(operator.getitem, node, (*leading, *index, *missing))
