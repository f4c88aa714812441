"""The op that a call becomes, as nodes of its graph."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.config import MechanismConfig
from compiled_sparse.passes.decisions import sparse_decision
from compiled_sparse.passes.fx import compute
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import layout_arguments
from compiled_sparse.passes.mask_nodes import COPIED_META
from compiled_sparse.passes.masks import KeyMask
from compiled_sparse.passes.masks import blank_padded_queries
from compiled_sparse.passes.masks import erase_unused
from compiled_sparse.passes.masks import insert_key_mask
from compiled_sparse.passes.masks import key_mask_of
from compiled_sparse.passes.runtime_arguments import RuntimeArguments
from compiled_sparse.passes.sites import Site
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import OpCall
from compiled_sparse.registry import Refused
from compiled_sparse.registry import mechanism_of
from compiled_sparse.report import Decision
from compiled_sparse.selector import Requested
from compiled_sparse.selector import SiteFacts


@dataclass(frozen=True)
class Replacement:
    """A call that was proven, and what it can become.

    Args:
        site: The call.
        wanted: What was asked for it.
        layout: Where its video is.
        chosen: The mechanism.
        arguments: The tensors its op can be given.
    """

    site: Site
    wanted: Requested
    layout: SiteLayout
    chosen: Chosen
    arguments: RuntimeArguments

    @property
    def runtime_names(self) -> tuple[str, ...]:
        """What the op reads at run time."""
        sizes = (hint(self.layout.text_before), hint(self.layout.text_after))
        return self._lower(list(self.layout.grid_hint), *sizes).runtime_inputs

    @property
    def refused(self) -> Refused | None:
        """Why the call cannot be given what the op reads, if it cannot."""
        return self.arguments.refusal(self.runtime_names, self.chosen.config)

    def decision(self, facts: SiteFacts) -> Decision:
        """Return the decision as reports show it."""
        missing = self.arguments.detail(self.runtime_names, self.chosen.config)
        detail = "; ".join(filter(None, (self.chosen.detail, missing)))
        chosen = dataclasses.replace(self.chosen, detail=detail)
        return sparse_decision(self.site, facts, self.layout, chosen, self.wanted)

    def apply(self) -> fx.Node:
        """Put the op in the place of the call and return its output."""
        site = self.site
        out, mask = self.insert(site.node)
        site.node.replace_all_uses_with(blank_padded_queries(site, mask, out))
        site.node.graph.erase_node(site.node)
        if key_mask_of(site) is not None:
            erase_unused(site.arguments["attn_mask"])
        return out

    def insert(self, before: fx.Node) -> tuple[fx.Node, KeyMask]:
        """Put the op in front of a node, and leave the call alone.

        Args:
            before: A node of the call's graph that does not come before it.

        Returns:
            The output, first of what the op returns, and the mask it was given.
        """
        site, graph = self.site, self.site.node.graph
        query, key, value = (site.arguments[name] for name in ("query", "key", "value"))
        form = key_mask_of(site)
        assert not isinstance(form, Refusal)
        mask = insert_key_mask(site, form)
        with graph.inserting_before(before):
            grid, *text = layout_arguments(site, self.layout)
            call = self._lower(grid, *text)
            config = self._config
            runtime = self.arguments.nodes(call.runtime_inputs, config, (text[0], text[1]))
            inputs = (query, key, value, mask.keys, *call.arguments, *runtime)
            op = graph.call_function(call.op, (*inputs, site.arguments["scale"]))
            out = graph.call_function(operator.getitem, (op, 0))
        _describe(site, op, out)
        return out, mask

    def _lower(self, grid: Any, *text: Any) -> OpCall:
        mechanism = mechanism_of(self.chosen.config)
        assert mechanism is not None
        return mechanism.lower(self._config, self.chosen.tile, grid, *text)

    @property
    def _config(self) -> MechanismConfig:
        """What the op computes: the part for this process's heads, where it has only some."""
        exchange = self.site.exchange
        config = self.chosen.config
        return config if exchange is None else config.for_heads(*exchange.heads)


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
        node.meta.update({k: site.node.meta[k] for k in COPIED_META if k in site.node.meta})
