"""The pass: decide every attention call of a graph, rewrite the proven ones."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.layout import Text
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.checks import Checks
from compiled_sparse.passes.decisions import dense_decision
from compiled_sparse.passes.decisions import other_decision
from compiled_sparse.passes.decisions import sparse_decision
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import as_sequence
from compiled_sparse.passes.layouts import can_be_dynamic
from compiled_sparse.passes.layouts import find_layout
from compiled_sparse.passes.layouts import is_static
from compiled_sparse.passes.layouts import layout_arguments
from compiled_sparse.passes.layouts import specialized
from compiled_sparse.passes.lookalikes import refuse_lookalikes
from compiled_sparse.passes.lowering import lower_einops
from compiled_sparse.passes.markers import Marker
from compiled_sparse.passes.markers import Markers
from compiled_sparse.passes.mask_forms import MaskForm
from compiled_sparse.passes.masks import blank_padded_queries
from compiled_sparse.passes.masks import erase_unused
from compiled_sparse.passes.masks import insert_key_mask
from compiled_sparse.passes.masks import key_mask_of
from compiled_sparse.passes.masks import slim_dense_mask
from compiled_sparse.passes.runtime_arguments import RuntimeArguments
from compiled_sparse.passes.runtime_inputs import RuntimeInput
from compiled_sparse.passes.runtime_inputs import RuntimeInputs
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.sites import find_sites
from compiled_sparse.policy import Policy
from compiled_sparse.policy import StepSchedule
from compiled_sparse.registry import Capabilities
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused
from compiled_sparse.registry import mechanism_of
from compiled_sparse.report import Decision
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import Requested
from compiled_sparse.selector import SiteFacts
from compiled_sparse.selector import at_layer
from compiled_sparse.selector import capabilities_of
from compiled_sparse.selector import choose
from compiled_sparse.selector import needs_static_grid
from compiled_sparse.selector import requested
from compiled_sparse.selector import scheduled_dense
from compiled_sparse.selector import tensors_supported

_COPIED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


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
        self.checked_paths: tuple[str, ...] = ()

    def __call__(self, owner: fx.GraphModule) -> list[Decision]:
        """Process a graph and the graphs nested in it.

        Args:
            owner: A graph module this pass may edit.

        Returns:
            One decision per attention call, in execution order. Afterwards `runtime_inputs` says
            which tensors must be passed behind the graph's own inputs, and `checked_paths` which
            calls the statistics behind its own outputs are about.
        """
        edited = lower_einops(owner)
        markers, runtime, checks = Markers(owner), RuntimeInputs(owner), Checks(owner)
        edited += markers.erase()
        sites, others = find_sites(owner)
        cases = self._cases(sites, markers, ends_here=not _has_graph_break(owner))
        decisions = [self._process(case, runtime, checks) for case in cases]
        decisions += [other_decision(other) for other in others]
        if self.rewrite:
            edited += [*(site.owner for site in sites), *runtime.edited, *checks.edited]
        for module in {id(module): module for module in edited}.values():
            module.graph.lint()
            module.recompile()
        self.runtime_inputs = runtime.inputs
        self.checked_paths = tuple(checks.paths)
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

    def _cases(self, sites: list[Site], markers: Markers, *, ends_here: bool) -> list[_Case]:
        layouts = [_layout_of(site, self.layout, markers.grid) for site in sites]
        layouts = refuse_lookalikes(sites, layouts)
        speaking = [markers.covering(site.node, site.path) for site in sites]
        facts = _site_facts(sites, layouts, speaking, ends_here=ends_here)
        return list(map(_Case, sites, layouts, facts, speaking))

    def _process(self, case: _Case, runtime: RuntimeInputs, checks: Checks) -> Decision:
        decision = self._decide(case, runtime, checks)
        if self.rewrite and not decision.is_sparse:
            slim_dense_mask(case.site)
        return decision

    def _decide(self, case: _Case, runtime: RuntimeInputs, checks: Checks) -> Decision:
        site, facts = case.site, case.facts
        wanted = requested(self.sources, facts)
        layout = case.layout_for(wanted)
        if not isinstance(layout, SiteLayout):
            return dense_decision(site, facts, layout)
        of_layer = at_layer(wanted, facts)
        if isinstance(of_layer, Refused):
            return dense_decision(site, facts, of_layer, wanted)
        wanted = of_layer
        outcome = _prove(site, wanted, layout, self.sparsity)
        dense = scheduled_dense(wanted, case.facts_for(wanted), self.dense_schedules)
        if isinstance(outcome, Refused):
            return dense_decision(site, facts, outcome, wanted)
        if dense is not None:
            return dense_decision(site, facts, dense, wanted)
        layout, chosen = outcome
        has_sparsity = self.sparsity is not None
        arguments = RuntimeArguments(
            runtime, site, facts, layout, case.marker, has_sparsity=has_sparsity
        )
        names = _runtime_names(layout, chosen)
        refused = arguments.refusal(names, chosen.config)
        if refused is not None:
            return dense_decision(site, facts, refused, wanted)
        if self.rewrite:
            out = _replace(site, layout, chosen, arguments)
            if self.check_rows:
                checks.add(site.path, site.owner, out, self.check_rows)
        detail = "; ".join(filter(None, (chosen.detail, arguments.detail(names, chosen.config))))
        return sparse_decision(site, facts, layout, replace(chosen, detail=detail), wanted)


@dataclass(frozen=True)
class _Case:
    """An attention call with all that bears on it."""

    site: Site
    layout: SiteLayout | Refused | Refusal
    facts: SiteFacts
    marker: Marker | None

    def facts_for(self, wanted: Requested) -> SiteFacts:
        """A numbered module's own policy says of its layer alone whether it is dense."""
        if wanted.origin != "module" or self.marker is None or self.marker.layer is None:
            return self.facts
        return replace(self.facts, layer=0, num_layers=1)

    def layout_for(self, wanted: Requested) -> SiteLayout | Refused | Refusal:
        """The layout in the form that a mechanism takes it."""
        if not wanted.config.grid_is_sequence or isinstance(self.layout, Refused):
            return self.layout
        return as_sequence(self.site, self.layout, is_attached=self.marker is not None)


def _layout_of(
    site: Site, given: LayoutMetadata | None, said: tuple[Any, ...] | None
) -> SiteLayout | Refused | Refusal:
    """Prove a layout: by `cs.metadata` or the graph, else by the grid an attached model named."""
    if not isinstance(site.tensor("query"), FakeTensor):
        return Refused("rank_unsupported", "inside a function transform such as vmap")
    if site.tensor("query").dim() != 4:
        return Refused("rank_unsupported", f"{site.tensor('query').dim()} dimensions")
    layout = find_layout(site, given)
    if given is None and said is not None and _is_unknown(layout):
        named = LayoutMetadata(tuple(int(axis) for axis in said))
        return _as_attached(find_layout(site, named))
    return layout


def _is_unknown(layout: SiteLayout | Refusal) -> bool:
    return isinstance(layout, Refusal) and layout.reason == "layout_unknown"


def _as_attached(layout: SiteLayout | Refusal) -> SiteLayout | Refusal:
    return replace(layout, origin="attach") if isinstance(layout, SiteLayout) else layout


def _runtime_names(layout: SiteLayout, chosen: Chosen) -> tuple[str, ...]:
    mechanism = mechanism_of(chosen.config)
    assert mechanism is not None
    sizes = (list(layout.grid_hint), hint(layout.text_before), hint(layout.text_after))
    return mechanism.lower(chosen.config, chosen.tile, *sizes).runtime_inputs


def _has_graph_break(owner: fx.GraphModule) -> bool:
    """Whether the model goes on in another graph; Dynamo leaves the reason on its graphs."""
    reason = getattr(owner, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def _site_facts(
    sites: list[Site],
    layouts: list[SiteLayout | Refused | Refusal],
    markers: list[Marker | None],
    *,
    ends_here: bool,
) -> list[SiteFacts]:
    """Number the proven video sites; a graph without the patch embedding may start anywhere."""
    proven = [isinstance(layout, SiteLayout) for layout in layouts]
    in_one_pass = _layers_of_a_pass(
        [site.path for site, is_layer in zip(sites, proven, strict=True) if is_layer]
    )
    facts = []
    for index, (site, layout, marker) in enumerate(zip(sites, layouts, markers, strict=True)):
        is_numbered = proven[index] and site.graph_has_video and in_one_pass is not None
        facts.append(
            SiteFacts(
                site.path,
                _kind(layout),
                None if marker is None else marker.policy,
                layer=sum(proven[:index]) % (in_one_pass or 1) if is_numbered else None,
                num_layers=in_one_pass if is_numbered and ends_here else None,
            )
        )
    return facts


def _layers_of_a_pass(paths: list[str]) -> int | None:
    """How many of the calls at these paths are one pass of a model; None where there is no telling.

    A graph may hold several passes, of classifier-free guidance or of denoising steps.
    """
    again = next((i for i in range(1, len(paths)) if paths[i] and paths[i] in paths[: i - 1]), None)
    if again is None:  # a module that makes two calls in a row is no new pass
        return len(paths)
    is_repeated = all(path == paths[i % again] for i, path in enumerate(paths))
    return again if is_repeated and len(paths) % again == 0 else None


def _kind(layout: SiteLayout | Refused | Refusal) -> str:
    if isinstance(layout, SiteLayout):
        return "joint" if hint(layout.text_before) + hint(layout.text_after) else "self"
    return "cross" if layout.reason == "cross_attention" else "self"


def _prove(
    site: Site, wanted: Requested, layout: SiteLayout, sparsity: float | None
) -> tuple[SiteLayout, Chosen] | Refused:
    """Default deny: every condition must hold, the first that does not is the reason."""
    config = wanted.config
    if isinstance(config, Dense):
        return Refused("policy_dense") if wanted.has_rule else Refused("no_rule")
    capabilities = capabilities_of(config)
    refused = (
        _call_supported(site, capabilities)
        or tensors_supported(
            site.tensor("query"),
            site.tensor("value"),
            capabilities,
            key_mask=_takes_key_mask(site),
        )
        or _broadcasts(site)
    )
    if refused is not None:
        return refused
    length = site.tensor("query").shape[2]
    # Compared before the grid becomes static: short sequences of any grid share one graph.
    if isinstance(config, Auto) and guard_or_false(length < config.min_tokens):
        return Refused("too_short", f"{hint(length)} tokens")
    if needs_static_grid(config):
        layout = specialized(layout)
    if not is_static(layout) and not can_be_dynamic(site, layout):
        return Refused("layout_dynamic")
    text = Text(hint(layout.text_before), hint(layout.text_after))
    heads = hint(site.tensor("query").shape[1])
    chosen = choose(config, layout.grid_hint, text.before, text.after, heads, sparsity)
    return chosen if isinstance(chosen, Refused) else (layout, chosen)


def _call_supported(site: Site, capabilities: Capabilities) -> Refused | None:
    arguments = site.arguments
    if arguments["dropout_p"] != 0.0:
        return Refused("dropout", f"dropout_p={arguments['dropout_p']}")
    if arguments["is_causal"] and not capabilities.causal:
        return Refused("causal")
    form = key_mask_of(site)
    if isinstance(form, Refusal):
        return Refused(form.reason, form.detail)
    return None


def _takes_key_mask(site: Site) -> bool:
    """Whether a mechanism must take a mask: one that hides nothing is left out."""
    form = key_mask_of(site)
    return isinstance(form, MaskForm) and not form.hides_nothing


def _broadcasts(site: Site) -> Refused | None:
    """Dense attention lets keys and values be broadcast; the op knows fewer key heads only."""
    query, key, value = (site.tensor(name).shape[:2] for name in ("query", "key", "value"))
    fits = (
        same(query[0], key[0])
        and same(key[0], value[0])
        and same(key[1], value[1])
        and same(query[1] % key[1], 0)
    )
    shapes = tuple(tuple(hint(size) for size in shape) for shape in (query, key, value))
    return None if fits else Refused("broadcast_unsupported", f"batch and heads {shapes}")


def _replace(
    site: Site, layout: SiteLayout, chosen: Chosen, arguments: RuntimeArguments
) -> fx.Node:
    graph = site.node.graph
    query, key, value = (site.arguments[name] for name in ("query", "key", "value"))
    form = key_mask_of(site)
    assert not isinstance(form, Refusal)
    mask = insert_key_mask(site, form)
    mechanism = mechanism_of(chosen.config)
    assert mechanism is not None
    with graph.inserting_before(site.node):
        grid, *text = layout_arguments(site, layout)
        call = mechanism.lower(chosen.config, chosen.tile, grid, *text)
        runtime = arguments.nodes(call.runtime_inputs, chosen.config, (text[0], text[1]))
        inputs = (query, key, value, mask.keys, *call.arguments, *runtime)
        op = graph.call_function(call.op, (*inputs, site.arguments["scale"]))
        out = graph.call_function(operator.getitem, (op, 0))
    _describe(site, op, out)
    site.node.replace_all_uses_with(blank_padded_queries(site, mask, out))
    graph.erase_node(site.node)
    if form is not None:
        erase_unused(site.arguments["attn_mask"])
    return out


def _describe(site: Site, op: fx.Node, out: fx.Node) -> None:
    """Give the new nodes what the inner compilers and their caches read."""
    query = site.tensor("query")
    assert isinstance(query, FakeTensor)
    with query.fake_mode:
        outputs = compute(op)
        # Under autocast the call itself casts; Dynamo recorded the dtype it will have.
        first = outputs[0].to(example_value(site.node).dtype)
    op.meta["example_value"] = (first, outputs[1])
    out.meta["example_value"] = first
    for node in (op, out):
        node.meta.update({k: site.node.meta[k] for k in _COPIED_META if k in site.node.meta})
