"""Graph passes: find attention calls, prove their layout, rewrite them."""

from __future__ import annotations

from compiled_sparse.passes.rewrite import SparseAttentionPass

__all__ = ["SparseAttentionPass"]
