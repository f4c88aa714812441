"""What each mechanism means, densely and slowly: the definition the rest is tested against."""

from __future__ import annotations

from compiled_sparse.reference.attention import attention
from compiled_sparse.reference.override import override

__all__ = ["attention", "override"]
