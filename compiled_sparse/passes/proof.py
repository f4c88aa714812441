"""What has to hold for a call to be rewritten, and the first thing that does not."""

from __future__ import annotations

from torch.fx.experimental.symbolic_shapes import guard_or_false

from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.layout import Text
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.layouts import can_be_dynamic
from compiled_sparse.passes.layouts import is_static
from compiled_sparse.passes.layouts import specialized
from compiled_sparse.passes.mask_forms import MaskForm
from compiled_sparse.passes.masks import key_mask_of
from compiled_sparse.passes.sites import Site
from compiled_sparse.registry import Capabilities
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused
from compiled_sparse.selector import Requested
from compiled_sparse.selector import capabilities_of
from compiled_sparse.selector import choose
from compiled_sparse.selector import needs_static_grid
from compiled_sparse.selector import tensors_supported


def prove(
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
    chosen = choose(config, layout.grid_hint, text.before, text.after, site.num_heads, sparsity)
    if isinstance(chosen, Chosen):
        return _on_several_processes(site, chosen) or (layout, chosen)
    return chosen


def _on_several_processes(site: Site, chosen: Chosen) -> Refused | None:
    """Refuse what needs several heads at once, or all keys, where processes have some of them."""
    if site.ring is not None:
        refusal = site.ring.refusal(chosen.config)
        return None if refusal is None else Refused("ring_unsupported", refusal)
    if site.exchange is None or chosen.config.has_separate_heads:
        return None
    return Refused("heads_divided", f"{site.num_heads} heads on several processes")


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
