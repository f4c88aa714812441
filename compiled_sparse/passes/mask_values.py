"""What an attention mask holds: a table of its values over boolean atoms.

The elements of a mask are a function of few bits. An *atom* is one such bit: an element of a
*leaf*, a small tensor whose elements are one of two values, picked by some of the mask's indices.
The table lists the mask's value for every assignment of the atoms, so that
`(1 - m[:, None]) * -10000.0` is the atom `m[index 0, index 2]` with the table `[-10000.0, 0.0]`.
That the atoms are independent is assumed; what is proven for all assignments holds for the
possible ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import fx

from compiled_sparse.passes.fx import example_value

MAX_ATOMS = 6


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor node of two possible values; compared by identity, as writes make new leaves.

    Args:
        node: The tensor.
        true_value: A bit is set where the tensor equals this.
    """

    node: fx.Node
    true_value: Any


@dataclass(frozen=True)
class Axis:
    """How an index of a mask picks an index of a leaf: `index[dim] // divisor`."""

    dim: int
    divisor: int = 1


@dataclass(frozen=True)
class Atom:
    """One bit of a leaf.

    Args:
        leaf: The leaf.
        axes: For each dimension of the leaf longer than one, which index of the mask picks.
    """

    leaf: Leaf
    axes: tuple[Axis, ...]

    @property
    def dims(self) -> set[int]:
        """The dimensions of the mask that the bit depends on."""
        return {axis.dim for axis in self.axes}


@dataclass(frozen=True, eq=False)
class MaskValue:
    """The content of a tensor as a function of atoms.

    Args:
        atoms: The bits it depends on.
        table: Real tensor of shape [2] * len(atoms) and of the mask's dtype.
    """

    atoms: tuple[Atom, ...]
    table: Tensor

    @property
    def values(self) -> list[Any]:
        """The distinct values the elements may have."""
        return sorted(set(self.table.flatten().tolist()))

    @property
    def dims(self) -> set[int]:
        """The dimensions the content depends on."""
        return set().union(*(atom.dims for atom in self.atoms))


def make_value(atoms: Sequence[Atom], table: Tensor) -> MaskValue | None:
    """Make a value without the atoms that do not matter; None if it has NaN or too many."""
    if bool((table != table).any()):
        return None
    kept = list(atoms)
    for atom in atoms:
        dim = kept.index(atom)
        first, second = table.unbind(dim)
        if torch.equal(first, second):
            table = first
            kept.remove(atom)
    return MaskValue(tuple(kept), table) if len(kept) <= MAX_ATOMS else None


def constant(value: Any, dtype: torch.dtype) -> MaskValue | None:
    """Return the value of a tensor that is the same number everywhere."""
    return make_value((), torch.tensor(value, dtype=dtype, device="cpu"))


def leaf_value(leaf: Leaf, shape: Sequence[Any], values: Sequence[Any]) -> MaskValue | None:
    """Return the value of a leaf's own tensor.

    Args:
        leaf: The leaf.
        shape: Its shape, None for each dimension of size one.
        values: What the tensor holds where the bit is unset and where it is set.
    """
    axes = tuple(Axis(dim) for dim, size in enumerate(shape) if size is not None)
    dtype = example_value(leaf.node).dtype
    return make_value([Atom(leaf, axes)], torch.tensor(list(values), dtype=dtype, device="cpu"))


def moved(value: MaskValue, axes: dict[int, int]) -> MaskValue:
    """Return a value whose dimensions were renumbered; every one it depends on must be named."""
    atoms = [Atom(a.leaf, tuple(Axis(axes[x.dim], x.divisor) for x in a.axes)) for a in value.atoms]
    return MaskValue(tuple(atoms), value.table)


def spread(value: MaskValue, atoms: Sequence[Atom]) -> Tensor:
    """Return a value's table as one over more atoms, broadcastable to [2] * len(atoms)."""
    if not value.atoms:
        return value.table
    order = [value.atoms.index(atom) for atom in atoms if atom in value.atoms]
    shape = [2 if atom in value.atoms else 1 for atom in atoms]
    return value.table.permute(order).reshape(shape)


def union(values: Sequence[MaskValue]) -> list[Atom]:
    """Return all atoms of some values, each once."""
    return list(dict.fromkeys(itertools.chain.from_iterable(value.atoms for value in values)))
