"""Sparse attention for video diffusion transformers, as a torch.compile backend.

    model = torch.compile(model, backend="compiled_sparse")

See README.md for a first run, and `explain` for what is done to each attention call of a model.
"""

from __future__ import annotations

from compiled_sparse import mechanisms as _mechanisms  # noqa: F401 - registers the built-in ones
from compiled_sparse import ops
from compiled_sparse import reference
from compiled_sparse.attach import attach
from compiled_sparse.attach import sparse
from compiled_sparse.block_map import get_block_map
from compiled_sparse.block_map import mean_pool
from compiled_sparse.compatible import compatible
from compiled_sparse.config import STA
from compiled_sparse.config import SWBA
from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.config_sla import SLA
from compiled_sparse.config_sla import SageSLA
from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.config_vsa import VSA
from compiled_sparse.explain import explain
from compiled_sparse.export import rewrite_exported
from compiled_sparse.force import force
from compiled_sparse.force import forced
from compiled_sparse.guard import Guard
from compiled_sparse.layout import Text
from compiled_sparse.metadata import metadata
from compiled_sparse.metadata import step_callback
from compiled_sparse.ops import attention
from compiled_sparse.policy import Policy
from compiled_sparse.policy import quality
from compiled_sparse.sparsity import sparsity_ramp
from compiled_sparse.windows import WindowTable

__all__ = [
    "SLA",
    "STA",
    "SWBA",
    "VSA",
    "Auto",
    "Dense",
    "Guard",
    "Policy",
    "SageSLA",
    "Text",
    "VMoBA",
    "WindowTable",
    "attach",
    "attention",
    "compatible",
    "explain",
    "force",
    "forced",
    "get_block_map",
    "mean_pool",
    "metadata",
    "ops",
    "quality",
    "reference",
    "rewrite_exported",
    "sparse",
    "sparsity_ramp",
    "step_callback",
]
