"""Operators of this package; importing registers them, and initialises no device."""

from __future__ import annotations

from compiled_sparse.ops import bind as _bind  # noqa: F401 - registers the markers
from compiled_sparse.ops import rank_sums as _rank_sums  # noqa: F401 - registers collectives
from compiled_sparse.ops import ulysses as _ulysses  # noqa: F401 - registers the exchanges
from compiled_sparse.ops.attention import attention
from compiled_sparse.ops.bit_masks import pack_bits
from compiled_sparse.ops.bit_masks import unpack_bits
from compiled_sparse.ops.block_sparse import block_sparse_attention
from compiled_sparse.ops.chunk_attention import chunk_sparse_attention
from compiled_sparse.ops.quantized import quantized_block_sparse_attention
from compiled_sparse.ops.tile_mean import tile_mean
from compiled_sparse.ops.top_k import top_k_blocks

__all__ = [
    "attention",
    "block_sparse_attention",
    "chunk_sparse_attention",
    "pack_bits",
    "quantized_block_sparse_attention",
    "tile_mean",
    "top_k_blocks",
    "unpack_bits",
]
