"""Which blocks a mechanism attends to: what its kernel op is given, taken on the way.

Nothing is computed twice or in another way than in use, and mechanisms of other packages that end
in the same kernel op are covered, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.ops.attention import attention
from compiled_sparse.ops.bit_masks import unpack_bits


@dataclass(frozen=True)
class BlockLists:
    """Key blocks of each query block.

    Args:
        indices: int32 [batch or 1, heads or 1, query blocks, K].
        counts: int32 [batch or 1, heads or 1, query blocks]; what follows in a row is padding.
        queries: How the sequence is cut into query blocks.
        keys: How it is cut into key blocks.
    """

    indices: Tensor
    counts: Tensor
    queries: BlockLayout
    keys: BlockLayout

    @property
    def density(self) -> float:
        """Fraction of (query, key) token pairs attended, counted over all heads."""
        keys = torch.tensor(self.keys.block_sizes, dtype=torch.float64)
        queries = torch.tensor(self.queries.block_sizes, dtype=torch.float64)
        seen = (keys[self.indices.long()] * self._listed()).sum(-1)
        heads = self.counts.shape[0] * self.counts.shape[1]
        return float((seen * queries).sum()) / (heads * self.queries.num_tokens**2)

    def mask(self, head: int = 0) -> Tensor:
        """Return which blocks see which, bool [query blocks, key blocks].

        Args:
            head: The head, of the first member of the batch.
        """
        head = head if self.indices.shape[1] > 1 else 0
        listed, rows = self._listed()[0, head], self.indices[0, head].long()
        # Padding repeats a block that may be listed, so listed slots are counted and not set.
        seen = torch.zeros(len(rows), self.keys.num_blocks, dtype=torch.int32)
        return seen.scatter_add(1, rows, listed.to(torch.int32)) > 0

    def of_head(self, head: int) -> BlockLists:
        """Return the lists of one head, of the first member of the batch."""
        head = head if self.indices.shape[1] > 1 else 0
        one = slice(head, head + 1)
        return BlockLists(self.indices[:1, one], self.counts[:1, one], self.queries, self.keys)

    def _listed(self) -> Tensor:
        return torch.arange(self.indices.shape[-1]) < self.counts[..., None]


@dataclass(frozen=True)
class ChunkSelection:
    """Key chunks of each query.

    Args:
        selected: int32 [batch, heads, chunks, words], a bit for each query.
        chunks: How the sequence is cut into chunks.
    """

    selected: Tensor
    chunks: BlockLayout

    @property
    def density(self) -> float:
        """Fraction of (query, key) token pairs attended, counted over all heads."""
        sizes = torch.tensor(self.chunks.block_sizes, dtype=torch.float64)
        heads = [
            float(sizes @ self.mask(head, member).sum(0).double())
            for member in range(self.selected.shape[0])
            for head in range(self.selected.shape[1])
        ]
        return sum(heads) / (len(heads) * self.chunks.num_tokens**2)

    def mask(self, head: int = 0, member: int = 0) -> Tensor:
        """Return which token sees which chunk, bool [tokens, chunks].

        Args:
            head: The head.
            member: The member of the batch.
        """
        return unpack_bits(self.selected[member, head], self.chunks.num_tokens).T

    def of_head(self, head: int) -> ChunkSelection:
        """Return what one head selects, of the first member of the batch."""
        return ChunkSelection(self.selected[:1, head : head + 1], self.chunks)


def block_lists(
    config: MechanismConfig,
    q: Tensor,
    k: Tensor,
    *,
    grid_thw: tuple[int, ...],
    text: Text | None = None,
    gate: Tensor | None = None,
) -> BlockLists | ChunkSelection | None:
    """Return what a mechanism selects on given queries and keys; None if it has no kernel op.

    Attention itself is not computed.

    Args:
        config: The mechanism.
        q: [batch, query heads, length, head_dim], on the CPU.
        k: [batch, key heads, length, head_dim].
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
        gate: [batch, query heads, length, head_dim], for a config that names one; nothing is
            selected by it.

    Raises:
        CompiledSparseError: whatever `compiled_sparse.attention` raises for this call.
    """
    recorder = _Recorder()
    # Of inference tensors the recorder would see the mechanism's op, and not those inside it.
    with torch.inference_mode(False), torch.no_grad():
        q, k = q.clone(), k.clone()
        with recorder:
            attention(q, k, k, config, grid_thw=grid_thw, text=text, gate=gate)
    return recorder.selection


class _Recorder(TorchDispatchMode):
    """Keeps what the last call of a kernel op is given, and leaves its work out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.selection: BlockLists | ChunkSelection | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ops = torch.ops.compiled_sparse
        if func is ops.chunk_sparse_attention.default:
            q, _, v, selected, _, grid, tile, before, after = args[:9]
            layout = BlockLayout(tuple(grid), tuple(tile), before, after)
            self.selection = ChunkSelection(selected, layout)
            return v.new_empty(q.shape), q.new_empty(q.shape[:3])
        if func not in (
            ops.block_sparse_attention.default,
            ops.quantized_block_sparse_attention.default,
        ):
            return func(*args, **(kwargs or {}))
        q, _, v, indices, counts, _, grid, q_tile, kv_tile, before, after = args[:11]
        layouts = (
            BlockLayout(tuple(grid), tuple(each), before, after) for each in (q_tile, kv_tile)
        )
        self.selection = BlockLists(indices, counts, *layouts)
        return v.new_empty(q.shape), q.new_empty(q.shape[:3])
