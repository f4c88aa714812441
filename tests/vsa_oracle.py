"""What video sparse attention means, tile by tile; shares no code with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import oracle
import torch
from torch import Tensor

Chosen = list[list[list[list[int]]]]
"""The key tiles, ascending, of every query tile of every head of every batch entry."""


class Case(NamedTuple):
    """Everything but the tensors of queries, keys, values and gate."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    sparsity: float = 0.0
    text: tuple[int, int] = (0, 0)
    key_mask: Tensor | None = None
    scale: float | None = None
    ungated: bool = False

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return math.prod(self.grid) + sum(self.text)

    @property
    def tiles(self) -> list[list[int]]:
        """Tokens of every tile, as positions in the sequence."""
        before = self.text[0]
        video = oracle.blocks(self.grid, self.tile)
        return [[before + token for token in tokens] for tokens in video]

    @property
    def kept(self) -> int:
        """Key tiles of each query tile."""
        count = math.ceil((1 - self.sparsity) * len(self.tiles))
        return min(max(count, 1), len(self.tiles))


class Result(NamedTuple):
    """What comes out, which tiles were chosen, and the share of the compressed branch."""

    out: Tensor
    lse: Tensor
    chosen: Chosen
    compressed: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    case: Case,
    gate: Tensor | None = None,
    *,
    chosen: Chosen | None = None,
    rounding: torch.dtype | None = None,
) -> Result:
    """Return video sparse attention in the dtype of the inputs, differentiable.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: Like `k`.
        case: Everything else.
        gate: Like `q`.
        chosen: Tiles to attend to, instead of those of the highest scores.
        rounding: What the published code rounds to: means, scores, and what each branch gives.
    """

    def rounded(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(x.dtype)

    groups = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // groups] for h in range(q.shape[1])], 1) for x in (k, v))
    means_q, means_k, means_v = (rounded(_means(x, case)) for x in (q, k, v))
    products = rounded(torch.einsum("bhqd,bhkd->bhqk", means_q, means_k))
    factor = 1 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale
    scores = rounded(products * factor)
    if chosen is None:
        chosen = _highest(scores, case)
    sparse, lse = oracle.attention(q, k, v, mask(chosen, case), case.key_mask, case.scale)
    if gate is None and not case.ungated:
        return Result(sparse, lse, chosen, torch.zeros_like(sparse))
    compressed = _compressed(scores, means_v, rounded, case)
    weighted = compressed if gate is None else compressed * gate
    return Result(rounded(rounded(sparse) + weighted), lse, chosen, weighted)


def _seen(case: Case, batch: int, tokens: Sequence[int]) -> list[int]:
    if case.key_mask is None:
        return list(tokens)
    return [token for token in tokens if bool(case.key_mask[batch, token])]


def _means(x: Tensor, case: Case) -> Tensor:
    """Means over the visible tokens of each tile; zero where there is none."""
    means = []
    for batch in range(x.shape[0]):
        row = []
        for tokens in case.tiles:
            seen = _seen(case, batch, tokens)
            total = torch.zeros_like(x[batch, :, 0])
            for token in seen:
                total = total + x[batch, :, token]
            row.append(total / max(len(seen), 1))
        means.append(torch.stack(row, dim=1))
    return torch.stack(means)


def _highest(scores: Tensor, case: Case) -> Chosen:
    """Tiles with a visible token before those without, then by score, then by number."""
    chosen: Chosen = []
    for batch, of_heads in enumerate(scores.tolist()):
        hidden = [not _seen(case, batch, tokens) for tokens in case.tiles]
        chosen.append(
            [
                [
                    sorted(sorted(range(len(row)), key=_rank(hidden, row))[: case.kept])
                    for row in of_head
                ]
                for of_head in of_heads
            ]
        )
    return chosen


def _rank(hidden: list[bool], row: list[float]) -> Callable[[int], tuple[bool, float, int]]:
    return lambda tile: (hidden[tile], 0.0 if hidden[tile] else -row[tile], tile)


def mask(chosen: Chosen, case: Case) -> Tensor:
    """Return which keys each query sees, [batch, heads, length, length]; text sees and is seen."""
    tiles, length = case.tiles, case.length
    seen = torch.ones(len(chosen), len(chosen[0]), length, length, dtype=torch.bool)
    for batch, of_heads in enumerate(chosen):
        for head, of_head in enumerate(of_heads):
            for query, listed in enumerate(of_head):
                rows = torch.tensor(tiles[query])[:, None]
                for tile in set(range(len(tiles))) - set(listed):
                    seen[batch, head, rows, torch.tensor(tiles[tile])] = False
    return seen


def _compressed(
    scores: Tensor, values: Tensor, rounded: Callable[[Tensor], Tensor], case: Case
) -> Tensor:
    """Attention among means: every tile with a visible token counts once; none for text."""
    batch_size, heads = values.shape[:2]
    out = [
        [[torch.zeros_like(values[0, 0, 0])] * case.length for _ in range(heads)]
        for _ in range(batch_size)
    ]
    for batch, head in itertools.product(range(batch_size), range(heads)):
        keys = [n for n, tokens in enumerate(case.tiles) if _seen(case, batch, tokens)]
        for query, tokens in enumerate(case.tiles):
            if not keys:
                continue
            weights = rounded(scores[batch, head, query, keys].softmax(-1))
            row = rounded(weights @ values[batch, head, keys])
            for token in tokens:
                out[batch][head][token] = row
    return torch.stack([torch.stack([torch.stack(head) for head in each]) for each in out])
