"""How elementwise operations, constants and writes act on masks. Importing registers the rules.

An elementwise operation is not modelled: it is carried out on the tables, on real tensors of the
dtypes the graph has, so that rounding and overflow are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import fx

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.mask_analysis import MaskAnalysis
from compiled_sparse.passes.mask_analysis import mask_rule
from compiled_sparse.passes.mask_values import MAX_ATOMS
from compiled_sparse.passes.mask_values import MaskValue
from compiled_sparse.passes.mask_values import constant
from compiled_sparse.passes.mask_values import make_value
from compiled_sparse.passes.mask_values import moved
from compiled_sparse.passes.mask_values import spread
from compiled_sparse.passes.mask_values import union
from compiled_sparse.passes.provenance_rules import operand_of

# fmt: off - one name per line would bury what belongs together
_ELEMENTWISE = (
    "and_",
    "or_",
    "xor",
    "invert",
    "__and__",
    "__or__",
    "__xor__",
    "__invert__",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "logical_not",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "sub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "truediv",
    "true_divide",
    "rsub",
    "neg",
    "abs",
    "sign",
    "log",
    "clamp",
    "clamp_min",
    "clamp_max",
    "minimum",
    "maximum",
    "masked_fill",
    "where",
)
_CASTS = (
    "to",
    "type",
    "type_as",
    "float",
    "bool",
    "half",
    "bfloat16",
    "double",
    "int",
    "long",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "cpu",
    "cuda",
)
_WRITING: dict[str, Callable[..., Any]] = {
    "masked_fill_": torch.masked_fill,
    "logical_and_": torch.logical_and,
    "logical_or_": torch.logical_or,
    "logical_not_": torch.logical_not,
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "iadd": torch.add,
    "isub": torch.sub,
    "imul": torch.mul,
    "iand": torch.bitwise_and,
    "ior": torch.bitwise_or,
}
_ONES = ("ones", "ones_like", "new_ones")
_ZEROS = ("zeros", "zeros_like", "new_zeros")
# fmt: on


@mask_rule(*_ELEMENTWISE)
def _elementwise(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    return _carried_out(analysis, node, node.target)


def _carried_out(analysis: MaskAnalysis, node: fx.Node, operation: Any) -> MaskValue | None:
    """Carry out an elementwise operation on the tables of all its operands."""
    operands = _operands(analysis, node)
    if operands is None:
        return None
    atoms = union(list(operands.values()))
    if len(atoms) > 2 * MAX_ATOMS:
        return None
    tables = {
        operand: _table_of(operand, value, atoms if value.atoms else ())
        for operand, value in operands.items()
    }
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), tables.__getitem__)
    if isinstance(operation, str):
        operation, args = getattr(args[0], operation), args[1:]
    table = _result(operation, args, kwargs)
    if table is None or table.dtype != example_value(node).dtype:
        return None
    return make_value(atoms, table.expand([2] * len(atoms)) if atoms else table.reshape(()))


def _operands(analysis: MaskAnalysis, node: fx.Node) -> dict[fx.Node, MaskValue] | None:
    """The operands' values in the result's dimensions; None if one is unknown."""
    shape = shape_of(node)
    if shape is None:
        return None
    operands = {}
    for operand in node.all_input_nodes:
        value, before = analysis.of(operand), shape_of(operand)
        if value is None or before is None:
            return None
        offset = len(shape) - len(before)
        if not all(same(before[dim], shape[dim + offset]) for dim in value.dims):
            return None
        operands[operand] = moved(value, {dim: dim + offset for dim in value.dims})
    return operands


def _table_of(operand: fx.Node, value: MaskValue, atoms: Sequence[Any]) -> Tensor:
    """An operand's table; one of a tensor with dimensions has some too, for type promotion."""
    table = spread(value, list(atoms))
    return table[None] if table.dim() == 0 and shape_of(operand) else table


def _result(operation: Any, args: Any, kwargs: Any) -> Tensor | None:
    try:
        table = operation(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None  # the operation wants what a table is not
    return table if isinstance(table, Tensor) else None


@mask_rule(*_CASTS)
def _cast(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    value, result = analysis.of(operand_of(node)), example_value(node)
    if value is None or not isinstance(result, Tensor):
        return None
    return make_value(value.atoms, value.table.to(result.dtype))


@mask_rule(*_ONES, *_ZEROS)
def _ones_or_zeros(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    return _filled(node, 1 if op_name(node) in _ONES else 0)


@mask_rule("full", "full_like", "new_full")
def _full(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    default = node.args[2] if op_name(node) == "new_full" and len(node.args) > 2 else None
    if op_name(node) != "new_full" and len(node.args) > 1:
        default = node.args[1]
    return _filled(node, node.kwargs.get("fill_value", default))


@mask_rule("tensor", "scalar_tensor")
def _number(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    return _filled(node, node.args[0] if node.args else None)


def _filled(node: fx.Node, number: Any) -> MaskValue | None:
    if not isinstance(number, bool | int | float) or shape_of(node) is None:
        return None
    return constant(number, example_value(node).dtype)


@mask_rule(*_WRITING, writes=True)
def _writing(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    return _carried_out(analysis, node, _WRITING[op_name(node)])


@mask_rule("setitem", writes=True)
def _setitem(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    """The elements are old ones or written ones, wherever they are."""
    target, written = node.args[0], node.args[2]
    old = analysis.of(target)
    if not isinstance(target, fx.Node) or old is None:
        return None
    new: MaskValue | None = None
    if isinstance(written, bool | int | float):
        new = constant(written, old.table.dtype)
    elif (value := analysis.of(written)) is not None:
        new = make_value(value.atoms, value.table.to(old.table.dtype))
    return None if new is None else analysis.fresh(target, sorted({*old.values, *new.values}))


@mask_rule("copy_", "fill_", "zero_", "index_fill_", "masked_scatter_", writes=True)
def _overwritten(analysis: MaskAnalysis, node: fx.Node) -> MaskValue | None:
    return None
