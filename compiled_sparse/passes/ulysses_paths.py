"""The steps between tensors of this rank's tokens and an attention call over all of them.

Steps move elements; one of them is an all-to-all. They are followed with the same rules that
follow tokens anywhere (`compiled_sparse.passes.reshapes`), every dimension a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._ops import OpOverloadPacket

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import inputs_of
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import walk
from compiled_sparse.passes.provenance_rules import operand_of
from compiled_sparse.passes.provenance_shapes import permutation_of
from compiled_sparse.passes.reshapes import reshape_tracks
from compiled_sparse.passes.tracks import Atom
from compiled_sparse.passes.tracks import Stream
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import Tracks
from compiled_sparse.passes.tracks import part_of

_PERMUTED = frozenset({"permute", "transpose", "swapaxes", "swapdims"})
_RESHAPED = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
)
_SAME = frozenset({"contiguous", "clone"})
_MOVES = _PERMUTED | _RESHAPED | _SAME
_EXCHANGE = "_c10d_functional::all_to_all_single"
_WAIT = "_c10d_functional::wait_tensor"
_ALL_GATHER = "_c10d_functional::all_gather_into_tensor"
_PIECES = frozenset({"cat", "chunk", "getitem", "split", "stack", "tensor_split"})
_RANKS = Stream(frozenset({"ranks"}), 0)


@dataclass(frozen=True)
class Path:
    """The steps between a tensor of this rank's tokens and one of all tokens.

    Args:
        nodes: In order of the graph, both ends included.
        group: The process group's name.
        size: Its number of processes.
        heads_first: Whether the local end is [batch, heads, rows, channels], not [batch, rows,
            heads, channels].
    """

    nodes: tuple[fx.Node, ...]
    group: str
    size: int
    heads_first: bool

    @property
    def goes_on(self) -> bool:
        """Whether its exchange would go on if the call left it: others read what comes of it."""
        exchange = next(i for i, node in enumerate(self.nodes) if _is_op(node, _EXCHANGE))
        return any(len(node.users) > 1 for node in self.nodes[exchange:-1])


def way_in(node: fx.Node) -> Path | None:
    """Find where the queries, keys or values of a call come from, heads and rows exchanged.

    Args:
        node: One of the three.

    Returns:
        The steps from a tensor of this rank's rows, where these provably are Ulysses'.
    """
    steps = list(_back_from(node))[::-1]
    exchange = next((step for step in steps if _is_op(step, _EXCHANGE)), None)
    if exchange is None:
        return None
    group, size = _processes(exchange)
    begin = steps.index(exchange)
    for first in range(begin - 1, -1, -1):
        nodes = tuple(steps[first:])
        for heads_first in (False, True):
            names = _names(nodes[0], heads_first)
            if names is None:
                break
            batch, heads, rows, channels = names
            fast = heads.digits(size)[1] if _divides(size, heads.size) else heads
            wanted = (batch,), (fast,), (replace(_RANKS, size=size), rows), (channels,)
            start = (
                (batch, heads, rows, channels) if heads_first else (batch, rows, heads, channels)
            )
            if _leads_to(nodes, [(each,) for each in start], size, wanted):
                return Path(nodes, group, size, heads_first)
    return None


def way_back(node: fx.Node) -> Path | None:
    """Find where the output of a call has all heads of this rank's rows again.

    Args:
        node: The call.

    Returns:
        The steps from the call on, where these provably are Ulysses'.
    """
    steps = list(_on_from(node))
    exchange = next((step for step in steps if _is_op(step, _EXCHANGE)), None)
    if exchange is None:
        return None
    group, size = _processes(exchange)
    names = _names(node, True)
    if names is None or not _divides(size, names[2].size):
        return None
    batch, heads, rows, channels = names
    fast = rows.digits(size)[1]
    joined = (replace(_RANKS, size=size), heads)
    for last in range(steps.index(exchange) + 1, len(steps)):
        nodes = tuple(steps[: last + 1])
        for heads_first in (False, True):
            middle = (joined, (fast,)) if heads_first else ((fast,), joined)
            wanted = ((batch,), *middle, (channels,))
            if _leads_to(nodes, [(each,) for each in names], size, wanted):
                return Path(nodes, group, size, heads_first)
    return None


def _back_from(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and what it is a rearrangement of, step by step."""
    yield node
    while _is_step(node):
        node = operand_of(node)
        yield node


def _on_from(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and its rearrangements, as long as nothing else reads them."""
    yield node
    while len(readers := [user for user in node.users if not _is_size(user)]) == 1:
        (user,) = readers
        if not _is_step(user) or operand_of(user) is not node:
            return
        node = user
        yield node


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size, or several."""
    value = example_value(node)
    sizes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(size, int | torch.SymInt) for size in sizes)


def _is_step(node: fx.Node) -> bool:
    """Whether a node moves the elements of one tensor; symbolic sizes are no tensors."""
    is_exchange = _is_op(node, _EXCHANGE) or _is_op(node, _WAIT)
    tensors = [each for each in node.all_input_nodes if shape_of(each) is not None]
    is_of_one = tensors == [operand_of(node)]
    return is_of_one and (is_exchange or (node.op != "placeholder" and op_name(node) in _MOVES))


def _is_op(node: fx.Node, name: str) -> bool:
    """Whether a node calls an op; by name, as a torch without collectives lacks these."""
    target = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.name == name)
    return isinstance(target, OpOverloadPacket) and target._qualified_op_name == name


def gathers_from_ranks(node: fx.Node) -> bool:
    """Whether a tensor is made of what all processes hold, as the keys of ring attention are.

    Args:
        node: The tensor.
    """

    def is_end(each: fx.Node) -> bool:
        return not _is_step(each) and op_name(each) not in _PIECES

    return any(_is_op(each, _ALL_GATHER) for each in walk(node, inputs_of, is_end))


def _processes(exchange: fx.Node) -> tuple[str, int]:
    splits: Any = exchange.args[1]
    return str(exchange.args[3]), len(splits)


def _names(node: fx.Node, heads_first: bool) -> tuple[Stream, Stream, Stream, Stream] | None:
    """Batch, heads, rows and channels of a tensor, each a stream of its own."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        return None
    batch, *middle, channels = (
        Stream(frozenset({(node, dim)}), size) for dim, size in enumerate(shape)
    )
    heads, rows = middle if heads_first else middle[::-1]
    return batch, heads, rows, channels


def _divides(parts: int, size: Any) -> bool:
    return same(size % parts, 0)


def _leads_to(
    nodes: tuple[fx.Node, ...],
    start: Sequence[tuple[Atom, ...]],
    size: int,
    wanted: Sequence[tuple[Atom, ...]],
) -> bool:
    """Whether the steps, one exchange among them, turn dimensions of these atoms into those."""
    if sum(_is_op(node, _EXCHANGE) for node in nodes) != 1:
        return False
    tracks: Tracks | None = tuple((part_of(atoms),) for atoms in start)
    for before, node in pairwise(nodes):
        tracks = None if tracks is None else _step(node, before, tracks, size)
    shape = shape_of(nodes[-1]) or ()
    if tracks is None or len(shape) != len(wanted):
        return False
    ends = [(part_of(atoms),) for atoms in wanted]
    return all(
        same(length, 1) or track == end
        for length, track, end in zip(shape, tracks, ends, strict=True)
    )


def _step(node: fx.Node, before: fx.Node, tracks: Tracks, size: int) -> Tracks | None:
    shape = shape_of(node)
    if shape is None or example_value(node).dtype != example_value(before).dtype:
        return None
    if _is_op(node, _WAIT):
        return tracks
    if _is_op(node, _EXCHANGE):
        first = _exchanged(node, tracks[0], size)
        return None if first is None else (first, *tracks[1:])
    name = op_name(node)
    if name in _PERMUTED:
        return tuple(tracks[dim] for dim in permutation_of(node, len(tracks)))
    if name in _SAME:
        return tracks
    return reshape_tracks(shape_of(before) or (), tracks, shape, node)


def _exchanged(node: fx.Node, track: Track, size: int) -> Track | None:
    """What the first dimension is behind an exchange of equal runs.

    Its slowest digit said to whom a run goes; now it says from whom it came.
    """
    received, sent = node.args[1:3]
    (part, *more) = track
    if more or part.cut is not None or received != sent or len(set(sent)) != 1:  # type: ignore[arg-type]
        return None
    first, *rest = part.atoms
    if not same(first.size, size):
        return None
    return (part_of([replace(_RANKS, size=size), *rest]),)
