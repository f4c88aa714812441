"""Heads scattered and gathered: every value of every rank, and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from processes import values
from sharded import shard_of
from sharded import whole_of
from torch import Tensor
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_sparse as cs
from compiled_sparse.distributed.cost import least_sent_bytes
from compiled_sparse.distributed.cost import ulysses
from compiled_sparse.distributed.cost_inputs import Cluster
from compiled_sparse.distributed.cost_inputs import Layer
from compiled_sparse.sharding import head_shares

OPS = torch.ops.compiled_sparse
CASES = [  # heads, key heads, video tokens, text before, text after
    (4, 4, 12, 0, 0),
    (3, 3, 13, 0, 0),
    (6, 2, 12, 0, 5),
    (4, 1, 11, 3, 2),
    (12, 6, 10, 2, 0),
    (1, 1, 7, 0, 1),
]
"""Heads and tokens that the ranks divide, and that they do not."""


def _whole(case: tuple[int, ...], names: int) -> list[Tensor]:
    heads, key_heads, video, before, after = case
    torch.manual_seed(0)
    counts = [heads, key_heads, key_heads, *[heads] * (names - 3)]
    length = video + before + after
    return [torch.randn(2, count, length, 8, dtype=torch.float64) for count in counts]


def _exchange(case: tuple[int, ...], *, names: int = 4) -> dict[str, Any]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    _, key_heads, video, before, after = case
    text = cs.Text(before=before, after=after)
    local = [shard_of(each, rank, size, text).requires_grad_() for each in _whole(case, names)]
    group = ("0", size, rank)
    scattered = OPS.scatter_heads(local, *group, video, before, after)
    weight = torch.arange(1, names + 1, dtype=torch.float64)
    out = scattered[0] * weight[0] + scattered[3] * weight[3]
    back = OPS.gather_heads(out, local[0], key_heads, *group, before, after)
    generator = torch.Generator().manual_seed(rank)
    grads = [torch.randn(each.shape, generator=generator).double() for each in (back, *scattered)]
    given = torch.autograd.grad([back, *scattered], local, grads)
    return {"scattered": scattered, "back": back, "grads": given, "weights": grads}


def _exchanges(cases: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    results = [_exchange(case) for case in cases]
    detached = [{name: _detached(each) for name, each in found.items()} for found in results]
    return detached


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else [each.detach() for each in value]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_rank_has_all_tokens_of_its_heads_and_gets_all_heads_of_its_tokens(size: int) -> None:
    found = values(size, _exchanges, CASES)
    for i, case in enumerate(CASES):
        _check(case, [of_rank[i] for of_rank in found])


def _check(case: tuple[int, ...], ranks: list[dict[str, Any]]) -> None:
    heads, key_heads, _, before, after = case
    text, size = cs.Text(before=before, after=after), len(ranks)
    whole = _whole(case, 4)
    for rank, (found, share) in enumerate(
        zip(ranks, head_shares(heads, key_heads, size), strict=True)
    ):
        for i, (mine, each) in enumerate(zip(found["scattered"], whole, strict=True)):
            chosen = list(share.key if i in (1, 2) else range(*share.query))
            expected = each[:, chosen] if chosen else torch.zeros_like(each[:, :1])
            assert torch.equal(mine, expected)
        expected = shard_of(whole[0] + 4 * whole[3], rank, size, text)
        assert torch.equal(found["back"], expected)
    _check_gradients(case, ranks)


def _check_gradients(case: tuple[int, ...], ranks: list[dict[str, Any]]) -> None:
    """The exact transpose: sums over ranks of what each weighed its results with."""
    heads, key_heads, video, before, after = case
    text, size = cs.Text(before=before, after=after), len(ranks)
    plan = head_shares(heads, key_heads, size)
    outs = whole_of([found["weights"][0] for found in ranks], video, text)
    expected = []
    for i, each in enumerate(_whole(case, 4)):
        grad = torch.zeros_like(each)
        for found, share in zip(ranks, plan, strict=True):
            chosen = list(share.key if i in (1, 2) else range(*share.query))
            for place, head in enumerate(chosen):
                grad[:, head] += found["weights"][1 + i][:, place]
        expected.append(grad + (outs * (1 + i) if i in (0, 3) else 0.0))
    for i, grad in enumerate(expected):
        torch.testing.assert_close(whole_of([r["grads"][i] for r in ranks], video, text), grad)


def test_key_heads_go_where_their_query_heads_are() -> None:
    for heads, group, size in itertools.product((1, 2, 3, 6, 12), (1, 2, 3), (1, 2, 3, 4, 8)):
        if heads % group:
            continue
        plan = head_shares(heads, heads // group, size)
        assert [h for share in plan for h in range(*share.query)] == list(range(heads))
        counts = [share.num_query for share in plan]
        assert max(counts) - min(counts) <= (group if heads // group >= size else 1)
        for share in plan:
            served = [head // group for head in range(*share.query)]
            each = len(served) // max(1, len(share.key))
            assert served == [key for key in share.key for _ in range(each)]


class _Sent(TorchDispatchMode):
    """Counts the bytes that leave this process."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            runs = [n for rank, n in enumerate(args[2]) if rank != distributed.get_rank()]
            self.sent += sum(runs) * args[0].element_size()
        return func(*args, **(kwargs or {}))


def _bytes_sent(cases: list[tuple[int, ...]]) -> list[int]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    found = []
    for case in cases:
        _, key_heads, video, before, after = case
        text = cs.Text(before=before, after=after)
        local = [shard_of(each, rank, size, text) for each in _whole(case, 3)]
        with _Sent() as counted:
            out = OPS.scatter_heads(local, "0", size, rank, video, before, after)[0]
            OPS.gather_heads(out, local[0], key_heads, "0", size, rank, before, after)
        found.append(counted.sent)
    return found


def test_no_byte_is_sent_that_the_model_of_the_costs_does_not_count() -> None:
    cases = [(4, 4, 12, 0, 0), (8, 4, 12, 0, 0), (4, 4, 12, 2, 5), (6, 6, 12, 0, 0)]
    for size in (2, 4):
        ranks = values(size, _bytes_sent, cases)
        cluster = Cluster(gpus=size)
        for i, (heads, key_heads, video, *text) in enumerate(cases):
            layer = Layer(
                video_tokens=video,
                text_tokens=sum(text),
                heads=heads,
                key_heads=key_heads,
                head_dim=8,
                element_bytes=8,
            )
            sent = [of_rank[i] / 2 for of_rank in ranks]  # of a batch of two
            assert max(sent) == ulysses(layer, cluster).sent_bytes
            assert sum(sent) / size == least_sent_bytes(layer, size)
