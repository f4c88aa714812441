"""Attention layers for models written for several processes: thin modules over the ops.

They compile in one graph, with any backend, and run eagerly. The interface is that of the layers
of FastVideo: [batch, tokens, heads, head_dim] in and out, text replicated on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import DistributedError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.ops.attention import attention
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.sharding import head_shares
from compiled_sparse.sharding import run_length
from compiled_sparse.sharding import sequence_group


class LocalAttention(nn.Module):
    """Attention among the tokens at hand, with nothing exchanged.

    Args:
        config: The mechanism.
        grid_thw: Token grid of the video; None for mechanisms that need none.
        scale: Softmax scale; None means `head_dim ** -0.5`.
    """

    def __init__(
        self,
        config: MechanismConfig,
        *,
        grid_thw: tuple[int, ...] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid_thw = None if grid_thw is None else as_grid(grid_thw)
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: [batch, tokens, query heads, head_dim].
            k: [batch, tokens, key heads, head_dim].
            v: like `k`.

        Returns:
            [batch, tokens, query heads, head_dim].

        Raises:
            CompiledSparseError: whatever `compiled_sparse.attention` raises.
        """
        query, key, value = (each.transpose(1, 2) for each in (q, k, v))
        out = attention(query, key, value, self.config, grid_thw=self.grid_thw, scale=self.scale)
        return out.transpose(1, 2)


class Replicated(NamedTuple):
    """Queries, keys and values of tokens that are on all ranks, such as text.

    Attributes:
        q: [batch, text tokens, query heads, head_dim].
        k: [batch, text tokens, key heads, head_dim].
        v: like `k`.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class DistributedAttention(nn.Module):
    """Attention over a video whose tokens are divided among processes (Ulysses).

    Each rank holds a run of the video's tokens in raster order, as long on every rank: what the
    last ones have too much is padding, which is neither attended to nor computed, and gets zeros.
    Two exchanges: queries, keys and values (and a gate) go stacked to the ranks that have their
    heads, and outputs back. Any number of heads: the first ranks get one more where it does not
    come out. Method: DeepSpeed-Ulysses, arXiv 2309.14509.

    Gradients are those of the sum of all ranks' losses; parameters that are on all ranks get their
    share from each, to be summed.

    Args:
        config: The mechanism.
        group: `DeviceMesh` with one dimension longer than 1, or `ProcessGroup`, of the ranks.
        grid_thw: Token grid of the whole video, after patching.
        scale: Softmax scale; None means `head_dim ** -0.5`.

    Raises:
        DistributedError: if the mesh has several dimensions or is a ring, or the mechanism looks at
            several heads at once.
        LayoutError: if the grid is not one to three positive integers.
    """

    def __init__(
        self,
        config: MechanismConfig,
        group: Any,
        *,
        grid_thw: tuple[int, ...],
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = sequence_group(group)
        self.grid_thw = as_grid(grid_thw)
        self.scale = scale
        if self.group.is_ring:
            raise DistributedError(
                "this layer divides heads",
                got='a mesh with a dimension called "ring"',
                expected="a mesh or group among which heads are divided",
                next_step="call compiled_sparse.distributed.ring_attention",
            )
        if self.group.size > 1 and not config.has_separate_heads:
            raise DistributedError(
                "this mechanism cannot have its heads on several ranks",
                got=config.describe(),
                expected="a mechanism in which what a head attends to depends on that head alone",
                next_step='for VMoBA, use moba_threshold_type="query_head" or "head_global"',
            )

    @property
    def rows(self) -> int:
        """Video tokens each rank holds, padding included."""
        return run_length(self.num_video, self.group.size)

    @property
    def num_video(self) -> int:
        """Tokens of the whole video."""
        return math.prod(self.grid_thw)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        replicated: Replicated | tuple[Tensor, Tensor, Tensor] | None = None,
        gate_compress: Tensor | None = None,
        step: int | None = None,
        layer: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            q: [batch, rows, query heads, head_dim], this rank's run of the video.
            k: [batch, rows, key heads, head_dim].
            v: like `k`.
            replicated: The same of text that is on all ranks, put behind the video.
            gate_compress: What weighs the compressed branch of `VSA`, like `q`; its text, if there
                is any, has a gate of zero.
            step: Denoising step, as for `compiled_sparse.attention`.
            layer: Layer, likewise.

        Returns:
            The outputs of the video, like `q`, and of the text, or None.

        Raises:
            ShapeError: if there are other than `rows` tokens, or text of which the three hold
                unequally many.
            CompiledSparseError: whatever `compiled_sparse.attention` raises.
        """
        self._check({"q": q, "k": k, "v": v, "gate_compress": gate_compress})
        tensors = [q, k, v]
        text = 0
        if replicated is not None:
            _check_text(replicated)
            text = replicated[0].shape[1]
            tensors = [torch.cat(pair, 1) for pair in zip(tensors, replicated, strict=True)]
        if gate_compress is not None:
            pad = gate_compress.new_zeros((q.shape[0], text, *q.shape[2:]))
            tensors.append(torch.cat((gate_compress, pad), 1) if text else gate_compress)
        out = self._exchanged([each.transpose(1, 2) for each in tensors], text, step, layer)
        rows = q.shape[1]
        return out[:, :rows], (out[:, rows:] if text else None)

    def _exchanged(
        self, tensors: list[Tensor], text: int, step: int | None, layer: int | None
    ) -> Tensor:
        group, ops = self.group, torch.ops.compiled_sparse
        query, key = tensors[:2]
        names = (group.name, group.size, group.rank)
        q, k, v, *gate = ops.scatter_heads(tensors, *names, self.num_video, 0, text)
        out = attention(
            q,
            k,
            v,
            _of_rank(self.config, group, query.shape[1], key.shape[1]),
            grid_thw=self.grid_thw,
            text=Text(after=text) if text else None,
            scale=self.scale,
            gate=gate[0] if gate else None,
            step=step,
            layer=layer,
        )
        gathered: Tensor = ops.gather_heads(out, query, key.shape[1], *names, 0, text)
        return gathered.transpose(1, 2)

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is None or (tensor.dim() == 4 and tensor.shape[1] == self.rows):
                continue
            raise ShapeError(
                "this rank holds another number of the video's tokens",
                got=f"{name} of shape {tuple(tensor.shape)}",
                expected=f"[batch, {self.rows}, heads, head_dim]: grid {self.grid_thw} on "
                f"{self.group.size} ranks",
                next_step="pad the tokens at the end to a multiple of the ranks, then divide them",
            )


def _check_text(replicated: Sequence[Tensor]) -> None:
    shapes = [tuple(each.shape) for each in replicated]
    lengths = [shape[1] for shape in shapes if len(shape) == 4]
    # Compared, not hashed: a text length stays symbolic in traced code.
    if len(shapes) == len(lengths) == 3 and lengths[0] == lengths[1] == lengths[2]:
        return
    raise ShapeError(
        "the replicated tokens are not one text",
        got=f"shapes {', '.join(map(str, shapes))}",
        expected="queries, keys and values [batch, text tokens, heads, head_dim], equally many",
        next_step="pass Replicated(q, k, v) of the same tokens, the same on all ranks",
    )


def _of_rank(
    config: MechanismConfig, group: SequenceGroup, heads: int, key_heads: int
) -> MechanismConfig:
    config.check_heads(heads)
    return config.for_heads(*head_shares(heads, key_heads, group.size)[group.rank].computed)
