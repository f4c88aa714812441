"""How operations that only move elements act on masks. Importing registers the rules.

What cannot be followed index by index may still be known by its values: a tensor of ones and zeros
stays one however its elements are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.mask_analysis import MaskAnalysis
from compiled_sparse.passes.mask_analysis import mask_rule
from compiled_sparse.passes.mask_values import Atom
from compiled_sparse.passes.mask_values import Axis
from compiled_sparse.passes.mask_values import MaskValue
from compiled_sparse.passes.mask_values import moved
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.provenance_shapes import index_items
from compiled_sparse.passes.provenance_shapes import permutation_of
from compiled_sparse.passes.reshapes import reshape_groups

Axes = dict[Axis, Axis]


def _moved_or_values(
    analysis: MaskAnalysis, node: fx.Node, value: MaskValue | None, axes: dict[int, int]
) -> MaskValue | None:
    if value is None:
        return None
    if value.dims <= axes.keys():
        return moved(value, axes)
    return _of_values(analysis, node, [value])


def _of_values(
    analysis: MaskAnalysis, node: fx.Node, values: Sequence[MaskValue | None]
) -> MaskValue | None:
    """What a tensor is whose elements all come from tensors of these values."""
    found: set[Any] = set()
    for value in values:
        if value is None:
            return None
        found.update(value.values)
    dtypes = {value.table.dtype for value in values if value is not None}
    if dtypes != {example_value(node).dtype}:
        return None
    return analysis.fresh(node, sorted(found))


@mask_rule("unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "view_as")
def _reshape(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    operand, shape = operand_of(node), shape_of(node)
    value, before = analysis.of(operand), shape_of(operand)
    if value is None or shape is None or before is None:
        return None
    if example_value(node).dtype != value.table.dtype:
        return None
    axes: Axes = {}
    for old, new in reshape_groups(before, shape) or []:
        axes.update(_reshaped_axes(before, shape, old, new, value.atoms))
    if not {axis for atom in value.atoms for axis in atom.axes} <= axes.keys():
        return _of_values(analysis, node, [value])
    atoms = [Atom(a.leaf, tuple(axes[axis] for axis in a.axes)) for a in value.atoms]
    return MaskValue(tuple(atoms), value.table)


def _reshaped_axes(
    before: Sequence[Any],
    after: Sequence[Any],
    old: list[int],
    new: list[int],
    atoms: Sequence[Atom],
) -> Axes:
    """Follow the axes of one group of dimensions: kept, split in two, or two merged."""
    used = {axis for atom in atoms for axis in atom.axes if axis.dim in old}
    if len(old) == len(new) == 1:
        return {axis: Axis(new[0], axis.divisor) for axis in used}
    if len(old) == 1 and len(new) == 2:
        inner = after[new[1]]
        return {axis: Axis(new[0]) for axis in used if same(axis.divisor, inner)}
    if len(old) == 2 and len(new) == 1 and isinstance(before[old[1]], int):
        divisor = int(before[old[1]])
        return {axis: Axis(new[0], axis.divisor * divisor) for axis in used if axis.dim == old[0]}
    return {}


@mask_rule("repeat_interleave")
def _repeat_interleave(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    operand, shape = operand_of(node), shape_of(node)
    value, before = analysis.of(operand), shape_of(operand)
    count = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if value is None or shape is None or before is None:
        return None
    if type(count) is not int or type(dim) is not int:
        return _of_values(analysis, node, [value])
    dim %= len(before)
    atoms = [
        Atom(
            a.leaf,
            tuple(Axis(x.dim, x.divisor * count) if x.dim == dim else x for x in a.axes),
        )
        for a in value.atoms
    ]
    return MaskValue(tuple(atoms), value.table)


@mask_rule("permute", "transpose", "swapaxes", "swapdims", "t")
def _permute(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    operand = operand_of(node)
    value = analysis.of(operand)
    if value is None:
        return None
    order = permutation_of(node, len(shape_of(operand) or ()))
    return moved(value, {old: new for new, old in enumerate(order)})


@mask_rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    operand, shape = operand_of(node), shape_of(node)
    value, before = analysis.of(operand), shape_of(operand)
    if value is None or shape is None or before is None:
        return None
    offset = len(shape) - len(before)
    kept = {d: d + offset for d, size in enumerate(before) if same(size, shape[d + offset])}
    return _moved_or_values(analysis, node, value, kept)


@mask_rule("getitem", "__getitem__")
def _getitem(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or shape_of(node) is None:
        return None
    before, shape = shape_of(source), shape_of(node) or ()
    if before is None:
        return analysis.element(source, index) if isinstance(index, int) else None
    value, items = analysis.of(source), index_items(index, len(before))
    if items is None:
        return None if value is None else _of_values(analysis, node, [value])
    return _moved_or_values(analysis, node, value, _kept_dims(items, before, shape))


def _kept_dims(items: Sequence[Any], before: Sequence[Any], shape: Sequence[Any]) -> dict[int, int]:
    """Which dimensions an index keeps whole and in order, and where they are then."""
    kept: dict[int, int] = {}
    old = new = 0
    for item in items:
        if item is None:
            new += 1
            continue
        if isinstance(item, slice):
            if item.step in (None, 1) and same(before[old], shape[new]):
                kept[old] = new
            new += 1
        old += 1
    return kept


@mask_rule("cat", "concat", "concatenate", "stack")
def _concatenate(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    operands = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(operands, list | tuple) or shape_of(node) is None:
        return None
    return _of_values(analysis, node, [analysis.of(operand) for operand in operands])


@mask_rule("pad")
def _pad(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    value = analysis.of(operand_of(node))
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    filler = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    if value is None or mode != "constant" or not isinstance(filler, bool | int | float | None):
        return None
    padding = torch.tensor(filler or 0, device="cpu").to(value.table.dtype)
    return _of_values(analysis, node, [value, MaskValue((), padding)])


@mask_rule("flip", "roll", "narrow", "select", "index_select", "chunk", "split", "unbind")
def _moved_elements(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    value = analysis.of(operand_of(node))
    if value is None or shape_of(node) is None:
        return None
    return _of_values(analysis, node, [value])
