"""The pass: decide every attention call of a graph, rewrite the proven ones."""

from __future__ import annotations

import hashlib
import operator
from pathlib import Path
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import Text
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import can_be_dynamic
from compiled_sparse.passes.layouts import find_layout
from compiled_sparse.passes.layouts import is_static
from compiled_sparse.passes.layouts import layout_arguments
from compiled_sparse.passes.layouts import specialized
from compiled_sparse.passes.mask_forms import MaskForm
from compiled_sparse.passes.masks import blank_padded_queries
from compiled_sparse.passes.masks import erase_unused
from compiled_sparse.passes.masks import insert_key_mask
from compiled_sparse.passes.masks import key_mask_of
from compiled_sparse.passes.masks import slim_dense_mask
from compiled_sparse.passes.sites import OtherAttention
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.sites import find_sites
from compiled_sparse.policy import Policy
from compiled_sparse.registry import Capabilities
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused
from compiled_sparse.registry import mechanism_of
from compiled_sparse.report import Decision
from compiled_sparse.selector import capabilities_of
from compiled_sparse.selector import choose
from compiled_sparse.selector import needs_static_grid
from compiled_sparse.selector import requested
from compiled_sparse.selector import tensors_supported

_COPIED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


class SparseAttentionPass:
    """Rewrite `scaled_dot_product_attention` calls into sparse ops, in place.

    Args:
        policy: Which mechanism for which call.
        layout: What `cs.metadata` says about the tokens, if anything.
        rewrite: False only decides and reports.
    """

    def __init__(
        self, policy: Policy, layout: LayoutMetadata | None = None, *, rewrite: bool = True
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.rewrite = rewrite

    def __call__(self, owner: fx.GraphModule) -> list[Decision]:
        """Process a graph and the graphs nested in it.

        Args:
            owner: A graph module this pass may edit.

        Returns:
            One decision per attention call, in execution order.
        """
        sites, others = find_sites(owner)
        decisions = [self._process(site) for site in sites]
        decisions += [_other_decision(other) for other in others]
        if self.rewrite:
            for module in {id(site.owner): site.owner for site in sites}.values():
                module.graph.lint()
                module.recompile()
        return decisions

    def uuid(self) -> str:
        """Return a key that changes with the pass's sources and with its settings."""
        digest = hashlib.sha256()
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        digest.update(repr((self.policy, self.layout, self.rewrite)).encode())
        return digest.hexdigest()

    def _process(self, site: Site) -> Decision:
        config = requested(self.policy, site.path)
        outcome = _prove(site, config, self.layout)
        if isinstance(outcome, Refused | Refusal):
            decision = _dense_decision(site, outcome)
            if self.rewrite:
                slim_dense_mask(site)
            return decision
        layout, chosen = outcome
        decision = _sparse_decision(site, layout, chosen)
        if self.rewrite:
            _replace(site, layout, chosen)
        return decision


def _prove(
    site: Site, config: MechanismConfig, given: LayoutMetadata | None
) -> tuple[SiteLayout, Chosen] | Refused | Refusal:
    """Default deny: every condition must hold, the first that does not is the reason."""
    if not isinstance(site.tensor("query"), FakeTensor):
        return Refused("rank_unsupported", "inside a function transform such as vmap")
    capabilities = capabilities_of(config)
    refused = (
        _call_supported(site, capabilities)
        or tensors_supported(site.tensor("query"), site.tensor("value"), capabilities)
        or _broadcasts(site)
    )
    if refused is not None and refused.reason == "rank_unsupported":
        return refused
    layout = find_layout(site, given)
    if isinstance(layout, Refusal):
        return layout
    if isinstance(config, Dense):
        return Refused("policy_dense")
    if refused is not None:
        return refused
    if needs_static_grid(config):
        layout = specialized(layout)
    if not is_static(layout) and not can_be_dynamic(site, layout):
        return Refused("layout_dynamic")
    text = Text(hint(layout.text_before), hint(layout.text_after))
    heads = hint(site.tensor("query").shape[1])
    chosen = choose(config, layout.grid_hint, text.before, text.after, heads)
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
    if form is not None and not form.hides_nothing and not capabilities.key_mask:
        return Refused("mask_unsupported", "the mechanism takes no mask")
    return None


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


def _replace(site: Site, layout: SiteLayout, chosen: Chosen) -> None:
    graph = site.node.graph
    query, key, value = (site.arguments[name] for name in ("query", "key", "value"))
    form = key_mask_of(site)
    assert not isinstance(form, Refusal)
    mask = insert_key_mask(site, form)
    mechanism = mechanism_of(chosen.config)
    assert mechanism is not None
    with graph.inserting_before(site.node):
        call = mechanism.lower(chosen.config, chosen.tile, *layout_arguments(site, layout))
        op = graph.call_function(
            call.op, (query, key, value, mask.keys, *call.arguments, site.arguments["scale"])
        )
        out = graph.call_function(operator.getitem, (op, 0))
    _describe(site, op, out)
    site.node.replace_all_uses_with(blank_padded_queries(site, mask, out))
    graph.erase_node(site.node)
    if form is not None:
        erase_unused(site.arguments["attn_mask"])


def _describe(site: Site, op: fx.Node, out: fx.Node) -> None:
    """Give the new nodes what the inner compilers and their caches read."""
    query = site.tensor("query")
    assert isinstance(query, FakeTensor)
    arguments = fx.node.map_arg(op.args, example_value)
    with query.fake_mode:
        outputs = op.target(*arguments)  # type: ignore[operator]
        # Under autocast the call itself casts; Dynamo recorded the dtype it will have.
        first = outputs[0].to(example_value(site.node).dtype)
    op.meta["example_value"] = (first, outputs[1])
    out.meta["example_value"] = first
    for node in (op, out):
        node.meta.update({k: site.node.meta[k] for k in _COPIED_META if k in site.node.meta})


def _other_decision(other: OtherAttention) -> Decision:
    return Decision(
        path=other.path, kind="other", decision="dense", reason="other_attention", detail=other.name
    )


def _dense_decision(site: Site, outcome: Refused | Refusal) -> Decision:
    kind = "cross" if outcome.reason == "cross_attention" else "self"
    return Decision(
        kind=kind, decision="dense", reason=outcome.reason, detail=outcome.detail, **_facts(site)
    )


def _sparse_decision(site: Site, layout: SiteLayout, chosen: Chosen) -> Decision:
    before, after = hint(layout.text_before), hint(layout.text_after)
    config = chosen.config.resolved(chosen.tile)
    return Decision(
        kind="joint" if before + after else "self",
        decision="sparse",
        mechanism=config.describe(),
        grid_thw=layout.grid_hint,
        text_before=before,
        text_after=after,
        layout_origin=layout.origin,
        dynamic=not is_static(layout),
        density=chosen.density,
        predicted_gain=chosen.predicted_gain,
        **_facts(site),
    )


def _facts(site: Site) -> dict[str, Any]:
    query, key = site.tensor("query"), site.tensor("key")
    return {
        "path": site.path,
        "query_shape": tuple(hint(size) for size in query.shape),
        "key_shape": tuple(hint(size) for size in key.shape),
        "dtype": str(query.dtype).removeprefix("torch."),
        "mask": _mask_name(site),
    }


def _mask_name(site: Site) -> str:
    form = key_mask_of(site)
    if not isinstance(form, MaskForm):
        return "" if form is None else "other"
    return form.name
