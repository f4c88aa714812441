"""The pass: decide every attention call of a graph, rewrite the proven ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import fx

from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.cases import Case
from compiled_sparse.passes.cases import find_cases
from compiled_sparse.passes.cases import has_graph_break
from compiled_sparse.passes.checks import add_check
from compiled_sparse.passes.decisions import dense_decision
from compiled_sparse.passes.decisions import other_decision
from compiled_sparse.passes.divided import divide
from compiled_sparse.passes.further_outputs import FurtherOutputs
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.lowering import lower_einops
from compiled_sparse.passes.markers import Markers
from compiled_sparse.passes.masks import slim_dense_mask
from compiled_sparse.passes.proof import prove
from compiled_sparse.passes.replacement import Replacement
from compiled_sparse.passes.rings import settle
from compiled_sparse.passes.runtime_arguments import RuntimeArguments
from compiled_sparse.passes.runtime_inputs import RuntimeInput
from compiled_sparse.passes.runtime_inputs import RuntimeInputs
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.sites import find_sites
from compiled_sparse.policy import Policy
from compiled_sparse.policy import StepSchedule
from compiled_sparse.registry import Refused
from compiled_sparse.report import Decision
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import Requested
from compiled_sparse.selector import at_layer
from compiled_sparse.selector import requested
from compiled_sparse.selector import scheduled_dense


class SparseAttentionPass:
    """Rewrite `scaled_dot_product_attention` calls into sparse ops, in place.

    Args:
        policy: Which mechanism for which call, or all the sources that have a say.
        layout: What `cs.metadata` says about the tokens, if anything.
        dense_schedules: The step schedules under which the present step is dense.
        rewrite: False only decides and reports.
        check_rows: How many query rows of each sparse call to compare with dense attention, as
            further outputs of the graph; 0 for none.
        sparsity: The sparsity of the present call, where calls are given one that is read at run
            time: only reported, as it may change from call to call.
    """

    def __init__(
        self,
        policy: Policy | PolicySources,
        layout: LayoutMetadata | None = None,
        *,
        dense_schedules: frozenset[StepSchedule] = frozenset(),
        rewrite: bool = True,
        check_rows: int = 0,
        sparsity: float | None = None,
    ) -> None:
        self.sources = PolicySources(policy) if isinstance(policy, Policy) else policy
        self.layout = layout
        self.dense_schedules = dense_schedules
        self.rewrite = rewrite
        self.check_rows = check_rows
        self.sparsity = sparsity
        self.runtime_inputs: tuple[RuntimeInput, ...] = ()
        self.further_outputs: tuple[Any, ...] = ()

    def __call__(self, owner: fx.GraphModule) -> list[Decision]:
        """Process a graph and the graphs nested in it.

        Args:
            owner: A graph module this pass may edit.

        Returns:
            One decision per attention call, in execution order. Afterwards `runtime_inputs` says
            which tensors must be passed behind the graph's own inputs, and `further_outputs` what
            those behind its own outputs are about: for checks, the paths of the calls.
        """
        edited = [*lower_einops(owner), *divide(owner, self.layout)]
        markers, runtime, outputs = Markers(owner), RuntimeInputs(owner), FurtherOutputs(owner)
        edited += markers.erase()
        sites, others = find_sites(owner)
        cases = find_cases(sites, markers, self.layout, ends_here=not has_graph_break(owner))
        decisions = [self._process(case, runtime, outputs) for case in cases]
        decisions += [other_decision(other) for other in others]
        if self.rewrite:
            edited += [*(site.owner for site in sites), *runtime.edited, *outputs.edited]
        for module in {id(module): module for module in edited}.values():
            module.graph.lint()
            module.recompile()
        self.runtime_inputs = runtime.inputs
        self.further_outputs = tuple(outputs.labels)
        return decisions

    def uuid(self) -> str:
        """Return a key that changes with the pass's sources and with its settings."""
        digest = hashlib.sha256()
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        schedules = sorted(map(repr, self.dense_schedules))
        settings = (self.sources, self.layout, schedules, self.rewrite, self.check_rows)
        digest.update(repr((*settings, self.sparsity is not None)).encode())
        return digest.hexdigest()

    def _process(self, case: Case, runtime: RuntimeInputs, outputs: FurtherOutputs) -> Decision:
        decision = self._decide(case, runtime, outputs)
        if not decision.is_sparse:
            leave_dense(case.site, slim=self.rewrite)
        return decision

    def _decide(self, case: Case, runtime: RuntimeInputs, outputs: FurtherOutputs) -> Decision:
        site, facts = case.site, case.facts
        wanted = requested(self.sources, facts)
        outcome = self.evaluate(case, wanted, runtime)
        if not isinstance(outcome, Replacement):
            # A layout that is not proven is refused before anyone is asked what to do.
            asked = wanted if isinstance(case.layout_for(wanted), SiteLayout) else None
            return dense_decision(site, facts, outcome, asked)
        if site.ring is not None:
            decision = outcome.decision(facts)
            settle(site.node, site.ring, outcome.chosen.config)
            return decision
        if self.rewrite:
            out = outcome.apply()
            if self.check_rows:
                add_check(outputs, site.path, site.owner, out, self.check_rows)
        return outcome.decision(facts)

    def evaluate(
        self, case: Case, wanted: Requested, runtime: RuntimeInputs
    ) -> Replacement | Refused | Refusal:
        """Decide what one call becomes, and edit nothing.

        Args:
            case: The call.
            wanted: What it is asked to become.
            runtime: The inputs that can be appended to the graph.
        """
        layout = case.layout_for(wanted)
        if not isinstance(layout, SiteLayout):
            return layout
        of_layer = at_layer(wanted, case.facts)
        if isinstance(of_layer, Refused):
            return of_layer
        wanted = of_layer
        outcome = prove(case.site, wanted, layout, self.sparsity)
        dense = scheduled_dense(wanted, case.facts_for(wanted), self.dense_schedules)
        if isinstance(outcome, Refused):
            return outcome
        if dense is not None:
            return dense
        layout, chosen = outcome
        has_sparsity = self.sparsity is not None
        arguments = RuntimeArguments(
            runtime, case.site, case.facts, layout, case.marker, has_sparsity=has_sparsity
        )
        replacement = Replacement(case.site, wanted, layout, chosen, arguments)
        return replacement.refused or replacement


def leave_dense(site: Site, *, slim: bool) -> None:
    """Leave a call dense: in a ring it still has to be made the ring's.

    Args:
        site: The call.
        slim: Whether to shrink its mask.
    """
    if site.ring is not None:
        settle(site.node, site.ring, None)
    elif slim:
        slim_dense_mask(site)
