"""Random programs of moves on a video whose tokens are numbered: what is claimed must be so."""

from __future__ import annotations

import math
import operator
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import fx

from compiled_sparse.passes.provenance import Provenance
from compiled_sparse.passes.sites import find_sites as find_sites  # registers all rules
from compiled_sparse.passes.tracks import Kind
from compiled_sparse.passes.tracks import Part
from compiled_sparse.passes.tracks import Piece
from compiled_sparse.passes.tracks import Track

GRID = (4, 2, 6)
BATCH = 2
STEPS = 14
PROGRAMS = 150


class Program:
    """A graph whose nodes hold real tensors; the values of the video are its token numbers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.graph = fx.Graph()
        pixels = self._noted(self.graph.placeholder("pixels"), torch.zeros(BATCH, 1, *GRID))
        weight = self._noted(self.graph.placeholder("weight"), torch.zeros(1, 1, 1, 1, 1))
        numbers = torch.arange(BATCH * math.prod(GRID)).reshape(BATCH, 1, *GRID)
        patch = self.graph.call_function(torch.conv3d, (pixels, weight))
        self.node = self._noted(patch, numbers)

    def _noted(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["example_value"] = value
        return node

    @property
    def value(self) -> Tensor:
        """The tensor so far."""
        value = self.node.meta["example_value"]
        assert isinstance(value, Tensor)
        return value

    def method(self, name: str, *args: Any, of: fx.Node | None = None) -> fx.Node:
        """Add a method call."""
        target = of or self.node
        result = getattr(target.meta["example_value"], name)(*args)
        return self._noted(self.graph.call_method(name, (target, *args)), result)

    def function(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a function call."""
        values = fx.node.map_arg(args, lambda n: n.meta["example_value"])
        return self._noted(self.graph.call_function(function, args), function(*values))

    def run(self) -> fx.GraphModule:
        """Make random moves."""
        for _ in range(STEPS):
            if self.value.dim() > 1:
                self.node = self.random.choice(MOVES)(self) or self.node
        self.graph.output(self.node)
        return fx.GraphModule(torch.nn.Module(), self.graph)

    def dim(self) -> int:
        """Choose a dimension."""
        return self.random.randrange(self.value.dim())

    def factors(self, size: int) -> tuple[int, int] | None:
        """Choose two factors of a size."""
        pairs = [(a, size // a) for a in range(2, size) if size % a == 0]
        return self.random.choice(pairs) if pairs else None


def _split(p: Program) -> fx.Node | None:
    dim = p.dim()
    pair = p.factors(p.value.shape[dim])
    return None if pair is None else p.method("unflatten", dim, pair)


def _merge(p: Program) -> fx.Node:
    dim = p.random.randrange(p.value.dim() - 1)
    return p.method("flatten", dim, dim + 1)


def _permute(p: Program) -> fx.Node:
    return p.method("permute", p.random.sample(range(p.value.dim()), p.value.dim()))


def _regroup(p: Program) -> fx.Node:
    shape = [p.value.numel()]
    for _ in range(p.random.randrange(1, 5)):
        at = p.random.randrange(len(shape))
        shape[at : at + 1] = p.factors(shape[at]) or (shape[at],)
    return p.method("reshape", shape)


def _cut_and_join(p: Program) -> fx.Node | None:
    dim = p.dim()
    if p.value.shape[dim] < 2:
        return None
    first = p.random.randrange(1, p.value.shape[dim])
    second = first if p.random.random() < 0.7 else p.random.randrange(1, p.value.shape[dim])
    before = (slice(None),) * dim
    halves = [
        p.function(operator.getitem, p.node, (*before, slice(None, first))),
        p.function(operator.getitem, p.node, (*before, slice(second, None))),
    ]
    return p.function(torch.cat, halves[:: p.random.choice([1, 1, 1, -1])], dim)


def _chunk_and_join(p: Program) -> fx.Node:
    dim = p.dim()
    chunks = p.method("chunk", 2, dim)
    number = len(chunks.meta["example_value"])
    pieces = [p.function(operator.getitem, chunks, i) for i in range(number)]
    return p.function(torch.cat, pieces[:: p.random.choice([1, 1, -1])], dim)


def _unbind_and_stack(p: Program) -> fx.Node:
    chunks = p.method("unbind", p.dim())
    number = len(chunks.meta["example_value"])
    pieces = [p.function(operator.getitem, chunks, i) for i in range(number)]
    return p.function(torch.stack, pieces, p.random.randrange(p.value.dim()))


def _windows(p: Program) -> fx.Node | None:
    dim = p.dim()
    pair = p.factors(p.value.shape[dim])
    return None if pair is None else p.method("unfold", dim, pair[1], pair[1])


def _write_back(p: Program) -> fx.Node:
    """Write a slice of a copy back where it was, or elsewhere."""
    copy, dim = p.method("clone"), p.dim()
    at = p.random.randrange(p.value.shape[dim])
    index = ((slice(None),) * dim) + (slice(at, None),)
    part = p.function(operator.getitem, p.node, index)
    if p.random.random() < 0.3:
        part = p.method("flip", dim, of=part)
    p.function(operator.setitem, copy, index, part)
    return copy


def _flip(p: Program) -> fx.Node | None:
    return p.method("flip", p.dim()) if p.random.random() < 0.2 else None


def _residual(p: Program) -> fx.Node:
    """Token numbers stay as they are if something that is zero is added."""
    return p.function(torch.add, p.node, p.method("mul", 0))


MOVES = (_split, _merge, _permute, _regroup, _cut_and_join, _chunk_and_join)
MOVES += (_unbind_and_stack, _windows, _write_back, _flip, _residual)


def _check(value: Tensor, dim: int, track: Track, found: Counter[str]) -> None:
    start = 0
    for part in track:
        tokens = value.narrow(dim, start, part.size).movedim(dim, 0).reshape(part.size, -1)
        start += part.size
        _check_part(tokens, part, found)


def _check_part(tokens: Tensor, part: Part, found: Counter[str]) -> None:
    """Compare what the atoms say of each position with the numbers of the tokens there."""
    position = torch.arange(part.size)[:, None] + (part.cut[0] if part.cut else 0)
    coordinates = torch.stack(torch.unravel_index(tokens, (BATCH, *GRID)))
    inner = math.prod(atom.size for atom in part.atoms)
    for atom in part.atoms:
        inner //= atom.size
        if isinstance(atom, Piece) and atom.kind is Kind.GRID:
            coordinate = coordinates[1 + atom.axis]
            assert (coordinate // atom.step % atom.size == position // inner % atom.size).all()
            found["digits"] += 1
            found["runs"] += part.cut is not None
            found["whole grids"] += [p.axis for p in part.pieces] == [0, 1, 2] and not part.cut


def _claims(seed: int) -> Counter[str]:
    module = Program(seed).run()
    analysis, found = Provenance(module), Counter[str]()
    for visit in analysis.run():
        found["nodes"] += visit.node.op != "placeholder"
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and node.op != "placeholder" and node.target != "mul":
            for dim, track in enumerate(analysis.of(node)):
                _check(value, dim, track, found)
    return found


@pytest.mark.parametrize("block", range(4))
def test_every_claim_about_tokens_holds(block: int) -> None:
    found = sum((_claims(PROGRAMS * block + i) for i in range(PROGRAMS)), Counter[str]())
    assert found["digits"] > 3000, found
    assert found["runs"] > 20, found
    assert found["whole grids"] > 50, found
