"""The attention calls of a graph with all that bears on them."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import as_sequence
from compiled_sparse.passes.layouts import find_layout
from compiled_sparse.passes.lookalikes import refuse_lookalikes
from compiled_sparse.passes.markers import Marker
from compiled_sparse.passes.markers import Markers
from compiled_sparse.passes.sites import Site
from compiled_sparse.registry import Refused
from compiled_sparse.selector import Requested
from compiled_sparse.selector import SiteFacts


@dataclass(frozen=True)
class Case:
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


def find_cases(
    sites: list[Site], markers: Markers, given: LayoutMetadata | None, *, ends_here: bool
) -> list[Case]:
    """Prove the layouts of a graph's calls and number its video layers.

    Args:
        sites: The calls, in execution order.
        markers: What the modules themselves say.
        given: What `cs.metadata` says about the tokens, if anything.
        ends_here: Whether the model ends in this graph.
    """
    layouts = [_layout_of(site, given, markers.grid) for site in sites]
    layouts = refuse_lookalikes(sites, layouts)
    speaking = [markers.covering(site.node, site.path) for site in sites]
    facts = _site_facts(sites, layouts, speaking, ends_here=ends_here)
    return list(map(Case, sites, layouts, facts, speaking))


def has_graph_break(owner: fx.GraphModule) -> bool:
    """Whether the model goes on in another graph; Dynamo leaves the reason on its graphs."""
    reason = getattr(owner, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


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
