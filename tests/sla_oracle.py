"""What sparse-linear attention means, token by token; shares no code with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import oracle
import torch
from attending import Chosen
from torch import Tensor


class Case(NamedTuple):
    """Everything but the tensors of queries, keys, values and projection."""

    grid: tuple[int, ...]
    q_tile: tuple[int, ...]
    k_tile: tuple[int, ...]
    ratio: float = 1.0
    text: tuple[int, int] = (0, 0)
    feature_map: str = "softmax"
    key_mask: Tensor | None = None
    scale: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return math.prod(self.grid) + sum(self.text)

    def blocks(self, tile: tuple[int, ...]) -> list[list[int]]:
        """Tokens of every block of the video, as positions in the sequence."""
        before = self.text[0]
        video = oracle.blocks(self.grid, tile)
        return [[before + token for token in tokens] for tokens in video]

    @property
    def q_blocks(self) -> list[list[int]]:
        """Blocks of queries."""
        return self.blocks(self.q_tile)

    @property
    def k_blocks(self) -> list[list[int]]:
        """Blocks of keys."""
        return self.blocks(self.k_tile)

    @property
    def kept(self) -> int:
        """Key blocks of each query block: cut off, but at least one."""
        return max(int(self.ratio * len(self.k_blocks)), 1)


class Result(NamedTuple):
    """What comes out, which blocks were chosen, and the share of the linear branch."""

    out: Tensor
    lse: Tensor
    chosen: Chosen
    linear: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    case: Case,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    chosen: Chosen | None = None,
    rounding: torch.dtype | None = None,
) -> Result:
    """Return sparse-linear attention in the dtype of the inputs, differentiable.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: Like `k`.
        case: Everything else.
        weight: Of the projection behind the linear branch, [head_dim, head_dim].
        bias: The same, [head_dim].
        chosen: Blocks to attend to, instead of those of the highest scores.
        rounding: What the scores are rounded to on their way.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // groups] for h in range(q.shape[1])], 1) for x in (k, v))
    if chosen is None:
        chosen = _highest(_scores(q.detach(), k.detach(), case, rounding), case)
    out, lse = oracle.attention(q, k, v, mask(chosen, case), case.key_mask, case.scale)
    if weight is None:
        return Result(out, lse, chosen, torch.zeros_like(out))
    linear = torch.stack(
        [
            _linear(q[batch], k[batch], v[batch], _seen(case, batch, range(case.length)), case)
            for batch in range(q.shape[0])
        ]
    )
    linear = torch.einsum("bhld,ed->bhle", linear, weight)
    linear = linear if bias is None else linear + bias
    return Result(out + linear, lse, chosen, linear)


def _seen(case: Case, batch: int, tokens: Sequence[int]) -> list[int]:
    if case.key_mask is None:
        return list(tokens)
    return [token for token in tokens if bool(case.key_mask[batch, token])]


def _mean(x: Tensor, tokens: list[int]) -> Tensor:
    """Mean [heads, head_dim] of some tokens of [heads, length, head_dim]; zero of none."""
    total = torch.zeros_like(x[:, 0])
    for token in tokens:
        total = total + x[:, token]
    return total / max(len(tokens), 1)


def _scores(q: Tensor, k: Tensor, case: Case, rounding: torch.dtype | None) -> Tensor:
    """Products of the means of queries, and of keys less their mean."""

    def rounded(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(x.dtype)

    scores = []
    for batch in range(q.shape[0]):
        mean = rounded(_mean(k[batch], _seen(case, batch, range(case.length))))
        smooth = rounded(k[batch] - mean[:, None])
        queries, keys = (
            [rounded(_mean(x, _seen(case, batch, tokens))) for tokens in blocks]
            for x, blocks in ((q[batch], case.q_blocks), (smooth, case.k_blocks))
        )
        rows = [torch.stack([(one * other).sum(-1) for other in keys], -1) for one in queries]
        scores.append(rounded(torch.stack(rows, dim=1)))
    return torch.stack(scores)


def _highest(scores: Tensor, case: Case) -> Chosen:
    """Blocks with a visible token before those without, then by score, then by number."""
    chosen: Chosen = []
    for batch, of_heads in enumerate(scores.tolist()):
        hidden = [not _seen(case, batch, tokens) for tokens in case.k_blocks]
        chosen.append(
            [[sorted(_order(row, hidden)[: case.kept]) for row in of_head] for of_head in of_heads]
        )
    return chosen


def _order(row: list[float], hidden: list[bool]) -> list[int]:
    rank: Callable[[int], tuple[bool, float, int]] = lambda block: (  # noqa: E731
        hidden[block],
        0.0 if hidden[block] else -row[block],
        block,
    )
    return sorted(range(len(row)), key=rank)


def mask(chosen: Chosen, case: Case) -> Tensor:
    """Return which keys each query sees, [batch, heads, length, length]; text sees and is seen."""
    keys, length = case.k_blocks, case.length
    seen = torch.ones(len(chosen), len(chosen[0]), length, length, dtype=torch.bool)
    for batch, head in itertools.product(range(len(chosen)), range(len(chosen[0]))):
        for query, tokens in enumerate(case.q_blocks):
            rows = torch.tensor(tokens)[:, None]
            for block in set(range(len(keys))) - set(chosen[batch][head][query]):
                seen[batch, head, rows, torch.tensor(keys[block])] = False
    return seen


def _linear(q: Tensor, k: Tensor, v: Tensor, seen: list[int], case: Case) -> Tensor:
    """Linear attention [heads, length, head_dim] of all queries over the keys that are seen."""
    heads, length, head_dim = q.shape
    products = q.new_zeros(heads, head_dim, head_dim)
    sums = q.new_zeros(heads, head_dim)
    for token in seen:
        key = _feature(k[:, token], case.feature_map)
        products = products + key[:, :, None] * v[:, token, None, :]
        sums = sums + key
    rows = []
    for token in range(length):
        query = _feature(q[:, token], case.feature_map)
        above = (query[:, :, None] * products).sum(1)
        rows.append(above / (1e-5 + (query * sums).sum(-1, keepdim=True)))
    return torch.stack(rows, dim=1)


def _feature(x: Tensor, feature_map: str) -> Tensor:
    """Apply a feature map to one token of each head."""
    if feature_map == "softmax":
        powers = (x - x.detach().amax(-1, keepdim=True)).exp()
        return powers / powers.sum(-1, keepdim=True)
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return x.clamp(min=0)
