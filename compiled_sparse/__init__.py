"""Sparse attention for video diffusion transformers, as a torch.compile backend.

    model = torch.compile(model, backend="compiled_sparse")

See README.md for a first run, and `explain` for what is done to each attention call of a model.
"""

from __future__ import annotations

from compiled_sparse import mechanisms as _mechanisms  # noqa: F401 - registers the built-in ones
from compiled_sparse import ops
from compiled_sparse import reference
from compiled_sparse.config import STA
from compiled_sparse.config import Dense
from compiled_sparse.explain import explain
from compiled_sparse.layout import Text
from compiled_sparse.metadata import metadata
from compiled_sparse.metadata import step_callback
from compiled_sparse.ops import attention
from compiled_sparse.policy import Policy

__all__ = [
    "STA",
    "Dense",
    "Policy",
    "Text",
    "attention",
    "explain",
    "metadata",
    "ops",
    "reference",
    "step_callback",
]
