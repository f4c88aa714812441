"""Learned projections of attention modules, behind the linear branch of sparse-linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import nn

from compiled_sparse.attach_learned import LearnedLayer
from compiled_sparse.attach_learned import children_of
from compiled_sparse.attach_learned import features
from compiled_sparse.attach_learned import query_projection
from compiled_sparse.errors import AttachError

_HEAD_DIMS = ("head_dim", "dim_head", "attention_head_dim", "head_size", "d_head")
_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")


def traced_projection(module: Any) -> list[Tensor]:
    """Return weight and bias of a traced module's projection; nothing where there is none.

    A layer that does more than `nn.Linear`, as LoRA's do, says what it computes by what it makes of
    an identity.
    """
    name, width = module._compiled_sparse_projection
    if not name:
        return []
    layer = getattr(module, name)
    if _is_plain(layer):
        bias: Tensor | None = layer.bias
        return [layer.weight] if bias is None else [layer.weight, bias]
    like = next(layer.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    rows = torch.eye(width + 1, width, device=like.device, dtype=dtype)
    made = layer(rows)
    return [(made[:width] - made[width]).t(), made[width]]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what its weight and bias say; subclasses and hooks may change it."""
    is_own = type(layer).forward is nn.Linear.forward and "forward" not in layer.__dict__
    return is_own and not layer._forward_pre_hooks and not layer._forward_hooks


def _sizes(module: nn.Module) -> tuple[int, int]:
    head_dim = _first_size(module, _HEAD_DIMS) or _width_per_head(module)
    if head_dim is None:
        raise AttachError(
            "nothing tells the size of the module's heads",
            got=children_of(module),
            expected="an attribute like head_dim, or heads beside a layer like to_q or qkv",
            next_step="give the module a projection of its own, nn.Linear(head_dim, head_dim)",
        )
    return head_dim, head_dim


def _first_size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    found = [getattr(module, name, None) for name in names]
    sizes = [each for each in found if isinstance(each, int) and each > 0]
    return sizes[0] if sizes else None


def _width_per_head(module: nn.Module) -> int | None:
    heads, found = _first_size(module, _HEADS), query_projection(module)
    if heads is None or found is None:
        return None
    projection, parts = found
    _, out_width = features(projection) or (0, 0)
    head_dim, rest = divmod(out_width, heads * parts)
    return None if rest else head_dim


def _dtype(module: nn.Module) -> torch.dtype:
    """Full precision whatever the model has, as published checkpoints: small, and trained."""
    return torch.float32


PROJECTION = LearnedLayer("projection", lambda config: config.projection_name, _sizes, _dtype)
