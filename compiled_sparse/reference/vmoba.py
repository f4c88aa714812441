"""Mixture-of-block attention, densely and literally, over a packed batch.

Written from the published definition: the visible tokens of all batch entries stand one behind the
other, each entry is a sequence with chunks of its own, and a mask [pairs of packed token and packed
chunk] says who competes with whom.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiled_sparse.config_vmoba import VMoBA
from compiled_sparse.layout import Text

if TYPE_CHECKING:
    from collections.abc import Mapping

_OWN_BONUS = 1e9
_NO_SPREAD = 1e-6
_NO_TOTAL = 1e-6


def vmoba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: VMoBA,
    *,
    grid_thw: tuple[int, ...],
    text: Text | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    runtime: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention under the mask of what each query selects.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: Like `k`.
        config: The config of one layer.
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
        key_mask: bool [batch, length]; a hidden token is in no chunk, and selects none but its own.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        runtime: Nothing that this mechanism reads.

    Returns:
        The output in v's dtype, and the log-sum-exp.
    """
    text = text or Text()
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(compute) for each in (k, v))
    if key_mask is not None:
        k, v = (each.masked_fill(~key_mask[:, None, :, None], 0.0) for each in (k, v))
    mask = vmoba_token_mask(q, k, config, grid_thw, text, key_mask)
    if key_mask is not None:
        mask &= key_mask[:, None, None, :]
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    scores = scale * (q.to(compute) @ k.transpose(-1, -2))
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (weights @ v).to(q.dtype), lse


@torch.no_grad()
def vmoba_token_mask(
    q: Tensor,
    k: Tensor,
    config: VMoBA,
    grid_thw: tuple[int, ...],
    text: Text,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Return which tokens each token attends to.

    Args:
        q: [batch, heads, length, head_dim].
        k: Like `q`.
        config: The config of one layer.
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
        key_mask: bool [batch, length].

    Returns:
        bool [batch, heads, length, length], text attended and attending; the mask is not applied.
    """
    batch, heads, length, _ = q.shape
    chunk = chunk_of_token(config, grid_thw).to(q.device)
    first = text.before
    video = slice(first, first + len(chunk))
    mask = torch.ones(batch, heads, length, length, dtype=torch.bool, device=q.device)
    mask[:, :, video, video] = chunk[:, None] == chunk
    visible = torch.ones(batch, len(chunk), dtype=torch.bool, device=q.device)
    if key_mask is not None:
        visible = key_mask[:, video]
    if not visible.any():
        return mask
    packed = Packed([chunk[seen] for seen in visible])
    tokens_q, tokens_k = (
        torch.cat([each[b, :, video][:, seen] for b, seen in enumerate(visible)], dim=1)
        for each in (q, k)
    )
    selected = packed.select(tokens_q, tokens_k, config)
    start = 0
    for b, seen in enumerate(visible):
        count = int(seen.sum())
        rows = slice(start, start + count)
        places = first + seen.nonzero()[:, 0]
        chosen = selected[:, rows][:, :, packed.chunk_of_token[rows]]
        mask[b, :, places[:, None], places] |= chosen
        start += count
    return mask


def chunk_of_token(config: VMoBA, grid_thw: tuple[int, ...]) -> Tensor:
    """Return the number of the chunk each video token lies in, int64 [tokens]."""
    frames, height, width = grid_thw
    places = itertools.product(range(frames), range(height), range(width))
    if config.kind == "temporal":
        size = int(config.temporal_chunk_size * height * width)
        chunks = [index // size for index, _ in enumerate(places)]
    else:
        sides = (frames, *config.spatial_chunk_size)
        sides = config.st_chunk_size if config.kind == "st" else sides
        boxes = [tuple(p // side for p, side in zip(at, sides, strict=True)) for at in places]
        numbers = {box: number for number, box in enumerate(sorted(set(boxes)))}
        chunks = [numbers[box] for box in boxes]
    return torch.tensor(chunks)


class Packed:
    """Sequences one behind the other; their chunks are numbered through.

    Args:
        sequences: The chunk of each token of each sequence.
    """

    def __init__(self, sequences: list[Tensor]) -> None:
        sequence, chunk_sequence, chunk = [], [], []
        num_chunks = 0
        for index, tokens in enumerate(sequences):
            present, local = tokens.unique(return_inverse=True)
            sequence += [index] * len(tokens)
            chunk_sequence += [index] * len(present)
            chunk.append(local + num_chunks)
            num_chunks += len(present)
        self.chunk_of_token = torch.cat(chunk)
        self.num_chunks = num_chunks
        device = self.chunk_of_token.device
        chunks = torch.arange(num_chunks, device=device)
        self.own = self.chunk_of_token[:, None] == chunks
        self.valid = torch.tensor(sequence, device=device, dtype=torch.int64)[
            :, None
        ] == torch.tensor(chunk_sequence, device=device, dtype=torch.int64)

    def gate(self, q: Tensor, k: Tensor) -> Tensor:
        """Return how much each token likes each chunk [heads, tokens, chunks], -inf elsewhere."""
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        sizes = self.own.sum(0)[:, None]
        means = (self.own.T.to(compute) @ k.to(compute)) / sizes
        gate = q.to(compute) @ means.transpose(-1, -2)
        return gate.masked_fill(~self.valid, float("-inf"))

    def select(self, q: Tensor, k: Tensor, config: VMoBA) -> Tensor:
        """Return the chunks each token attends to, bool [heads, tokens, chunks].

        Args:
            q: [heads, tokens, head_dim].
            k: Like `q`.
            config: The config of one layer.
        """
        gate = self.gate(q, k)
        if config.moba_select_mode == "topk":
            selected = self.best(gate, config.topk, config.moba_threshold_type)
        else:
            threshold, groups = config.moba_threshold, config.moba_threshold_type
            selected = self.above_threshold(gate, threshold, groups)
        selected = selected & ~self.own
        if not selected.any():
            return self.valid.expand_as(gate)
        return selected | self.own

    def best(self, gate: Tensor, topk: int, groups: str) -> Tensor:
        """Select the `topk` best chunks of each token, on average over what competes."""
        gate = torch.where(self.own, gate + _OWN_BONUS, gate)
        tokens = gate.shape[1]
        count = min(topk, self.num_chunks)
        counts = {"query_head": 1, "head_global": tokens, "overall": tokens * gate.shape[0]}
        wanted = count * counts[groups]
        pairs = _grouped(gate, groups)
        order = pairs.sort(dim=-1, descending=True, stable=True).indices[:, :wanted]
        chosen = torch.zeros_like(pairs, dtype=torch.bool).scatter(-1, order, True)
        return _ungrouped(chosen, groups, gate) & self.valid

    def above_threshold(self, gate: Tensor, threshold: float, groups: str) -> Tensor:
        """Select the fewest pairs whose share of what competes, own ones included, is enough."""
        valid, own = (_grouped(each.expand_as(gate), groups) for each in (self.valid, self.own))
        rows = _normalised(_grouped(gate, groups), valid).double()
        chosen = [
            _shortest_prefix(row.tolist(), counted.tolist(), mine.tolist(), threshold)
            for row, counted, mine in zip(rows, valid, own, strict=True)
        ]
        return _ungrouped(torch.tensor(chosen, device=gate.device), groups, gate)


_ORDERS = {
    # Of [heads, tokens, chunks]: axes that tell groups apart, then what competes, in tie order.
    "query_head": ((0, 1), (2,)),
    "block": ((2,), (0, 1)),
    "head_global": ((0,), (2, 1)),
    "overall": ((), (2, 0, 1)),
}


def _grouped(pairs: Tensor, groups: str) -> Tensor:
    """Return pairs as [groups, what competes]."""
    outer, inner = _ORDERS[groups]
    moved = pairs.permute(*outer, *inner)
    return moved.reshape(int(torch.tensor([pairs.shape[i] for i in outer]).prod()), -1)


def _ungrouped(rows: Tensor, groups: str, like: Tensor) -> Tensor:
    """Undo `_grouped`."""
    axes = sum(_ORDERS[groups], ())
    moved = rows.reshape([like.shape[axis] for axis in axes])
    return moved.permute(*(axes.index(axis) for axis in range(len(axes))))


def _normalised(gate: Tensor, valid: Tensor) -> Tensor:
    """Scale each row's valid entries to 0..1; all others are 0."""
    low = gate.masked_fill(~valid, float("inf")).amin(-1, keepdim=True)
    spread = gate.masked_fill(~valid, float("-inf")).amax(-1, keepdim=True) - low
    spread = torch.where(spread > _NO_SPREAD, spread, 1.0)
    return ((gate - low) / spread).masked_fill(~valid, 0.0)


def _shortest_prefix(
    gate: list[float], valid: list[bool], own: list[bool], threshold: float
) -> list[bool]:
    """Select, of one group, the own entries' share included, the fewest that reach a threshold."""
    total = sum(gate)
    of_own = sum(value for value, is_own in zip(gate, own, strict=True) if is_own)
    need = max(0.0, threshold - of_own / (total + _NO_TOTAL))
    others = [i for i in range(len(gate)) if valid[i] and not own[i]]
    others.sort(key=lambda i: -gate[i])  # stable: of equal ones the first
    chosen, reached = [False] * len(gate), 0.0
    for i in others:
        chosen[i] = True
        reached += gate[i]
        if reached / (total + _NO_TOTAL) >= need:
            break
    return chosen
