"""Which hidden states feed an attention call: what its inputs are projected from."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from compiled_sparse.passes.fx import between
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.fx import storage_of
from compiled_sparse.passes.fx import walk
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.sites import has_one_batch
from compiled_sparse.passes.tracks import Track
from compiled_sparse.passes.tracks import track_size
from compiled_sparse.passes.writes import may_write

_PROJECTIONS = frozenset({"linear", "matmul"})
_VIEWS = (
    "view reshape flatten unflatten transpose permute movedim swapaxes contiguous clone detach "
    "chunk split split_with_sizes tensor_split unbind getitem select narrow slice squeeze "
    "unsqueeze expand expand_as view_as view_as_real view_as_complex repeat repeat_interleave cat "
    "concat stack pad roll flip to float half bfloat16 double type type_as empty_like zeros_like "
    "setitem copy_ "
)
_CHANNELS = (
    "add sub mul div truediv neg pow square sqrt rsqrt mean sum var norm linalg_vector_norm "
    "rms_norm layer_norm group_norm normalize cos sin where clamp clamp_min masked_fill dropout "
    "iadd imul isub add_ mul_ sub_ "
)
_BETWEEN = _PROJECTIONS | frozenset((_VIEWS + _CHANNELS).split())
"""What may stand between a hidden state and queries, keys and values: rotations, norms, heads."""


@dataclass(frozen=True)
class HiddenState:
    """Input of projections that lead to the queries, the keys and the values of one call.

    Args:
        node: [batch, tokens, channels].
        tokens: What its tokens are.
        is_of_batch: Whether it provably is of the queries' batch members.
    """

    node: fx.Node
    tokens: Track
    is_of_batch: bool


def hidden_states(site: Site, given: Sequence[fx.Node]) -> list[HiddenState]:
    """Return what queries, keys and values of a call are all projected from.

    Args:
        site: The call.
        given: Arguments of the module that makes it: what was not computed from any is not its own.
    """
    results = [site.arguments[name] for name in ("query", "key", "value")]
    flow = _Flow(site.analysis.writers)
    inputs = [dict.fromkeys(flow.nearest_inputs(node)) for node in results]
    if any(len(shape_of(node) or ()) != 3 for each in inputs for node in each):
        return []  # of projections that cannot be compared none is known to be the one
    return [
        _hidden_state(site, node)
        for node in inputs[0]
        if all(node in each for each in inputs)
        and flow.comes_from(node, given)
        and all(flow.is_projected(result, node) for result in results)
    ]


def _hidden_state(site: Site, node: fx.Node) -> HiddenState:
    query, analysis = site.arguments["query"], site.analysis
    batch, tokens = analysis.of(node)[:2]
    is_of_batch = (
        same(track_size(batch), track_size(analysis.of(query)[0]))
        and analysis.picks_of(query) == analysis.picks_of(node)
        and has_one_batch(analysis, query, query, node)
    )
    return HiddenState(node, tokens, is_of_batch)


class _Flow:
    """Which tensors of a graph are computed from which, writes into memory included.

    Args:
        writers: The graph's operations that may write into their inputs.
    """

    def __init__(self, writers: Sequence[fx.Node]) -> None:
        self._writers: dict[int, list[fx.Node]] = {}
        for node in writers:
            if may_write(node) and node.all_input_nodes:
                for storage in storage_of(node.all_input_nodes[0]):
                    self._writers.setdefault(storage, []).append(node)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        writers = [each for s in storage_of(node) for each in self._writers.get(s, ())]
        nodes = [*node.all_input_nodes, *writers]
        return [each for each in nodes if each is not node and _holds_tensors(each)]

    def nearest_inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the inputs of the projections met first on the way back from a node."""
        for each in self._walk(node, _is_projection):
            source = _projected(each)
            if source is not None:
                yield source

    def comes_from(self, node: fx.Node, given: Sequence[fx.Node]) -> bool:
        """Whether a node is one of those given, or computed from one."""
        return any(each in given for each in self._walk(node, given.__contains__))

    def is_projected(self, result: fx.Node, source: fx.Node) -> bool:
        """Whether nothing but projections, norms and rotations leads from one to the other."""
        leading = between(source, result, self._inputs)
        reaching = {source, *leading}
        return result in reaching and all(self._keeps_channels(n, reaching) for n in leading)

    def _keeps_channels(self, node: fx.Node, reaching: set[fx.Node]) -> bool:
        """Whether an operation is a projection, or no projection in disguise."""
        name = op_name(node)
        sides = [each for each in self._inputs(node) if each not in reaching]
        weights = (each for side in sides for each in self._walk(side, _is_projection))
        is_plain = name in _PROJECTIONS or not any(map(_is_matrix, weights))
        return name in _BETWEEN and is_plain

    def _walk(self, start: fx.Node, is_end: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Yield a node and all it is computed from, not going behind those where it ends."""
        return walk(start, self._inputs, is_end)


def _projected(node: fx.Node) -> fx.Node | None:
    """Return what a projection is applied to; None for other operations."""
    if op_name(node) not in _PROJECTIONS:
        return None
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _is_projection(node: fx.Node) -> bool:
    return _projected(node) is not None


def _is_matrix(node: fx.Node) -> bool:
    """Whether a node is a parameter that may be the weight of a projection."""
    value = example_value(node)
    return isinstance(value, torch.nn.Parameter) and value.dim() > 1


def _holds_tensors(node: fx.Node) -> bool:
    """Whether a value is a tensor, or several; sizes say nothing of what a tensor holds."""
    value = example_value(node)
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(each, torch.Tensor) for each in values)
