"""Attention masks that are provably key padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.sites import Site


def is_key_padding(site: Site) -> bool:
    """Whether a site's mask says per key, for all heads and queries alike, seen or not.

    Proven by type and shape alone: a boolean mask [batch, 1, 1, key length].
    """
    mask = example_value(site.arguments["attn_mask"])
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
        return False
    key = site.tensor("key")
    expected: tuple[Any, ...] = (key.shape[0], 1, 1, key.shape[2])
    return all(same(size, want) for size, want in zip(mask.shape, expected, strict=True))


def key_mask_node(site: Site) -> fx.Node | None:
    """Insert the [batch, key length] mask in front of a site; None where it has no mask."""
    mask = site.arguments["attn_mask"]
    if mask is None:
        return None
    index = (slice(None), 0, 0)
    graph = site.node.graph
    with graph.inserting_before(site.node):
        selected = graph.call_method("__getitem__", (mask, index))
    selected.meta["example_value"] = example_value(mask)[index]
    return selected
