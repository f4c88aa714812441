"""What the pass found and did, in the form of the report."""

from __future__ import annotations

from typing import Any

import torch

from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import is_static
from compiled_sparse.passes.mask_forms import MaskForm
from compiled_sparse.passes.masks import key_mask_of
from compiled_sparse.passes.sites import OtherAttention
from compiled_sparse.passes.sites import Site
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused
from compiled_sparse.report import Decision
from compiled_sparse.selector import Requested
from compiled_sparse.selector import SiteFacts


def other_decision(other: OtherAttention) -> Decision:
    """Return the decision about an attention call this package does not rewrite."""
    return Decision(
        path=other.path, kind="other", decision="dense", reason="other_attention", detail=other.name
    )


def dense_decision(
    site: Site, facts: SiteFacts, outcome: Refused | Refusal, wanted: Requested | None = None
) -> Decision:
    """Return the decision about a call that stays dense.

    Args:
        site: The call.
        facts: What policies go by.
        outcome: Why it stays dense.
        wanted: What was asked for it, where it came to that.
    """
    return Decision(
        kind=facts.kind,
        decision="dense",
        reason=outcome.reason,
        detail=outcome.detail,
        layer=facts.layer,
        **_source(wanted),
        **_facts(site),
    )


def sparse_decision(
    site: Site, facts: SiteFacts, layout: SiteLayout, chosen: Chosen, wanted: Requested
) -> Decision:
    """Return the decision about a call that becomes sparse.

    Args:
        site: The call.
        facts: What policies go by.
        layout: Where its video is.
        chosen: The mechanism.
        wanted: What was asked for it.
    """
    config = chosen.config.resolved(chosen.tile)
    return Decision(
        kind=facts.kind,
        decision="sparse",
        mechanism=config.describe(),
        config=config,
        detail="; ".join(filter(None, (chosen.detail, _where(site)))),
        grid_thw=layout.grid_hint,
        text_before=hint(layout.text_before),
        text_after=hint(layout.text_after),
        layout_origin=layout.origin,
        layer=facts.layer,
        dynamic=not is_static(layout),
        density=chosen.density,
        predicted_gain=chosen.predicted_gain,
        **_source(wanted),
        **_facts(site),
    )


def _source(wanted: Requested | None) -> dict[str, Any]:
    if wanted is None:
        return {}
    return {"config_origin": wanted.origin, "schedule": wanted.policy.describe_schedule()}


def _where(site: Site) -> str:
    if site.ring is not None:
        return f"ring of {site.ring.group.size} processes"
    return "" if site.exchange is None else f"heads on {site.exchange.group.size} processes"


def _facts(site: Site) -> dict[str, Any]:
    query, key = site.tensor("query"), site.tensor("key")
    return {
        "path": site.path,
        "query_shape": _shape(query, site.num_heads),
        "key_shape": _shape(key, site.num_key_heads),
        "dtype": str(query.dtype).removeprefix("torch."),
        "mask": _mask_name(site),
    }


def _shape(tensor: torch.Tensor, heads: int) -> tuple[int, ...]:
    """A shape with the heads of all processes, so that all report the same."""
    sizes = [hint(size) for size in tensor.shape]
    return tuple(heads if dim == 1 and len(sizes) == 4 else size for dim, size in enumerate(sizes))


def _mask_name(site: Site) -> str:
    form = key_mask_of(site)
    if not isinstance(form, MaskForm):
        return "" if form is None else "other"
    return form.name
