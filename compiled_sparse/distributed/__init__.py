"""Sequence parallelism on torch.distributed: several devices, one compiled graph."""

from __future__ import annotations

from compiled_sparse.distributed.agreement import agree
from compiled_sparse.distributed.layers import DistributedAttention
from compiled_sparse.distributed.layers import LocalAttention
from compiled_sparse.distributed.layers import Replicated
from compiled_sparse.distributed.ring import ring_attention
from compiled_sparse.distributed.ring import ring_refusal
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.sharding import sequence_group

__all__ = [
    "DistributedAttention",
    "LocalAttention",
    "Replicated",
    "SequenceGroup",
    "agree",
    "ring_attention",
    "ring_refusal",
    "sequence_group",
]
