"""The pass of a calibration: dense calls beside every candidate, and how far these are off.

Nothing is rewritten: the model computes what it computes without us, and hands out some sums.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_sparse.config import MechanismConfig
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.ops import candidate_errors as _op  # noqa: F401 - defines the ops
from compiled_sparse.passes.cases import Case
from compiled_sparse.passes.decisions import dense_decision
from compiled_sparse.passes.further_outputs import FurtherOutputs
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import specialized
from compiled_sparse.passes.masks import KeyMask
from compiled_sparse.passes.replacement import Replacement
from compiled_sparse.passes.rewrite import SparseAttentionPass
from compiled_sparse.passes.rewrite import leave_dense
from compiled_sparse.passes.runtime_inputs import RuntimeInputs
from compiled_sparse.passes.runtime_inputs import fake_mode_of
from compiled_sparse.policy import Policy
from compiled_sparse.registry import Refused
from compiled_sparse.report import Decision
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import requested


@dataclass(frozen=True, kw_only=True)
class ProbedSite:
    """One call whose candidates are measured.

    Args:
        path: Dotted module path.
        kind: "self" or "joint".
        grid_thw: Token grid.
        text: Text tokens before and after the video.
        heads: Query heads.
        head_dim: Head size.
        densities: Fraction of (query, key) pairs each candidate attends to.
        tiles: Tile sides of each candidate on this grid.
        layer: Index among the video attention layers of the model; None where not known.
        num_layers: How many such layers the model has, likewise.
    """

    path: str
    kind: str
    grid_thw: tuple[int, ...]
    text: tuple[int, int]
    heads: int
    head_dim: int
    densities: tuple[float, ...]
    tiles: tuple[tuple[int, ...], ...]
    layer: int | None = None
    num_layers: int | None = None


Receive = Callable[[Sequence[ProbedSite], Sequence[torch.Tensor]], None]
"""What is called after each run of a graph: its sites, and float64 [candidates, heads, sums]."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """What to measure, and who is told.

    Args:
        candidates: The configs to compare with dense attention.
        receive: Called after each run of a graph that holds probed calls.
        rows: How many query positions the captured mass is taken from.
    """

    candidates: tuple[MechanismConfig, ...]
    receive: Receive
    rows: int = 256


class ProbePass(SparseAttentionPass):
    """Write every candidate beside each call that all of them can be proven for.

    Afterwards `further_outputs` holds a `ProbedSite` for each of these calls.

    Args:
        probe: The candidates.
        layout: What `cs.metadata` says about the tokens, if anything.
    """

    def __init__(self, probe: Probe, layout: LayoutMetadata | None = None) -> None:
        super().__init__(Policy({"*": probe.candidates[0]}), layout)
        self.probe = probe

    def _process(self, case: Case, runtime: RuntimeInputs, outputs: FurtherOutputs) -> Decision:
        """Return what was decided about the first candidate that does not fit, or the first."""
        if case.site.ring is not None:
            refused = Refused("ring_unsupported", "candidates are measured with all keys at hand")
            decision = dense_decision(case.site, case.facts, refused)
            leave_dense(case.site, slim=False)
            return decision
        if isinstance(case.layout, SiteLayout):
            # What is said of the site holds for one grid: another one is another graph.
            case = dataclasses.replace(case, layout=specialized(case.layout))
        replacements = []
        for candidate in self.probe.candidates:
            # Forced, as a module's own policy would outrank it otherwise.
            sources = PolicySources(forced=Policy({"*": candidate}))
            wanted = requested(sources, case.facts)
            outcome = self.evaluate(case, wanted, runtime)
            if not isinstance(outcome, Replacement):
                return dense_decision(case.site, case.facts, outcome, wanted)
            replacements.append(outcome)
        self._measure(case, replacements, outputs)
        return replacements[0].decision(case.facts)

    def _measure(
        self, case: Case, replacements: list[Replacement], outputs: FurtherOutputs
    ) -> None:
        site, ops = case.site, torch.ops.compiled_sparse
        query, key, scale = (site.arguments[name] for name in ("query", "key", "scale"))
        anchor, sampled, sums = site.node.next, None, []
        # In this order one candidate's output is gone before the next one is computed.
        for replacement in replacements:
            out, mask = replacement.insert(anchor)
            if sampled is None:
                inputs = (query, key, mask.keys, self.probe.rows, scale)
                sampled = _call(case, anchor, ops.sampled_log_sums.default, inputs)
            shown = _shown(case, anchor, mask)
            results = (site.node, out, _log_sum(anchor, out), sampled, shown)
            sums.append(_call(case, anchor, ops.candidate_errors.default, results))
        stacked = _call(case, anchor, torch.stack, (sums,))
        if site.exchange is not None:
            group = site.exchange.group
            heads = [share.num_query for share in site.exchange.shares]
            arguments = (stacked, group.name, group.rank, heads)
            stacked = _call(case, anchor, ops.join_heads.default, arguments)
        outputs.hand_out(_probed_site(case, replacements), site.owner, stacked)


def _probed_site(case: Case, replacements: list[Replacement]) -> ProbedSite:
    first, query = replacements[0], case.site.tensor("query")
    layout = first.layout
    return ProbedSite(
        path=case.site.path,
        kind=case.facts.kind,
        grid_thw=layout.grid_hint,
        text=(hint(layout.text_before), hint(layout.text_after)),
        heads=case.site.num_heads,
        head_dim=hint(query.shape[3]),
        densities=tuple(each.chosen.density for each in replacements),
        tiles=tuple(each.chosen.tile for each in replacements),
        layer=case.facts.layer,
        num_layers=case.facts.num_layers,
    )


def _shown(case: Case, anchor: fx.Node, mask: KeyMask) -> fx.Node | None:
    """Tokens that are hidden neither as keys nor as queries, bool [batch or 1, length]."""
    if mask.keys is None or mask.queries is None:
        return mask.keys if mask.queries is None else mask.queries
    return _call(case, anchor, operator.and_, (mask.keys, mask.queries))


def _log_sum(anchor: fx.Node, out: fx.Node) -> fx.Node:
    """Return the log-sum-exp that comes with an output."""
    op = out.args[0]
    assert isinstance(op, fx.Node)
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(operator.getitem, (op, 1))
    node.meta["example_value"] = op.meta["example_value"][1]
    return node


def _call(case: Case, anchor: fx.Node, function: Any, arguments: tuple[Any, ...]) -> fx.Node:
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(function, arguments)
    with fake_mode_of(case.site):
        node.meta["example_value"] = compute(node)
    return node
