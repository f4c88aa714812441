"""What sequence parallelism costs by arithmetic: bytes, times and shares of one layer.

A model, not a measurement. Ulysses (arXiv 2309.14509) divides tokens outside attention and heads
inside it: q, k and v go to the ranks of their heads, the output comes back. What comes after it
is two levels: Ulysses inside a node, and keys and values passed from node to node in a ring
(arXiv 2310.01889, combined in arXiv 2405.07719). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

from compiled_sparse.distributed.cost_inputs import Cluster
from compiled_sparse.distributed.cost_inputs import Layer
from compiled_sparse.geometry import attention_flops
from compiled_sparse.sharding import HeadShare
from compiled_sparse.sharding import head_shares
from compiled_sparse.sharding import shares


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Forward of one layer: times of the busiest rank, in seconds; nothing overlaps but `passed`.

    Args:
        sent_bytes: Most that a rank sends in the exchanges.
        least_bytes: What no exchange by heads can do without; see `least_sent_bytes`.
        exchange_s: Both exchanges: the slower kind of link in each, and latencies.
        passed_bytes: Of keys and values that a rank passes on to other nodes.
        passed_s: Time of that; attention hides it as far as it goes.
        attention_s: Attention of the rank with most heads.
        other_s: Everything else.
    """

    sent_bytes: int
    least_bytes: float
    exchange_s: float
    passed_bytes: int = 0
    passed_s: float = 0.0
    attention_s: float
    other_s: float

    @property
    def communication_s(self) -> float:
        """Time in which nothing is computed."""
        return self.exchange_s + max(0.0, self.passed_s - self.attention_s)

    @property
    def total_s(self) -> float:
        """Time of the layer."""
        return self.communication_s + self.attention_s + self.other_s

    @property
    def communication_share(self) -> float:
        """Share of communication in the time of the layer."""
        return self.communication_s / self.total_s


def balance(layer: Layer, ranks: int) -> float:
    """Return what is used of the ranks where heads are divided: H / (P * ceil(H / P)).

    1 where the ranks divide the heads. Beyond as many ranks as heads the others are idle: Ulysses
    alone gains nothing more in attention. Query heads that share a key head stay together, which
    may leave less.

    Args:
        layer: The layer, with H query heads.
        ranks: Number of ranks, P.
    """
    most = head_shares(layer.heads, layer.key_heads, ranks)[0].num_query
    return layer.heads / (ranks * most)


def least_sent_bytes(layer: Layer, ranks: int) -> float:
    """Return what a rank must send on average, if heads are computed as a whole.

    A rank that computes h query heads with k key heads needs their q, k and v for all L tokens. Of
    these 1/P are its own, so (h + 2k) * L * D * (1 - 1/P) elements have to come, and of the output
    h * L * D * (1 - 1/P) have to go back, whoever computes which head. The sum over ranks, where
    every key head is somewhere and every rank with a query head has a key head, divided by P:

        (2 H + 2 max(H_k, min(H, P))) * L * D * (P - 1) / P^2

    which is 4 L H D (P - 1) / P^2 with as many key heads as query heads. Text, which every rank
    has, is not sent, but every rank needs its output in all heads: T H D (P - 1) / P more.

    Args:
        layer: The layer.
        ranks: Number of ranks, P.
    """
    key_heads = max(layer.key_heads, min(layer.heads, ranks))
    of_video = 2 * (layer.heads + key_heads) * layer.video_tokens / ranks
    of_text = layer.heads * layer.text_tokens
    return (of_video + of_text) * layer.vector_bytes * (ranks - 1) / ranks


def ulysses(layer: Layer, cluster: Cluster) -> LayerCost:
    """Return the cost of a layer whose heads are divided among all GPUs.

    What is sent does not depend on the density, so the sparser attention is, the larger is the
    share of communication.

    Args:
        layer: The layer.
        cluster: The GPUs.
    """
    ranks = cluster.gpus
    lengths = shares(layer.video_tokens, ranks)
    heads = head_shares(layer.heads, layer.key_heads, ranks)

    def inputs(source: int, target: int) -> int:
        return lengths[source] * _vectors(heads[target])

    def outputs(source: int, target: int) -> int:
        return (lengths[target] + layer.text_tokens) * heads[source].num_query

    exchanges = [
        _Exchange(amount, layer.vector_bytes, cluster) for amount in (inputs, outputs) if ranks > 1
    ]
    sent = [sum(each.sent(rank) for each in exchanges) for rank in range(ranks)]
    return LayerCost(
        sent_bytes=max(sent),
        least_bytes=least_sent_bytes(layer, ranks),
        exchange_s=sum(each.seconds() for each in exchanges),
        attention_s=_attention_s(layer, cluster, layer.video_tokens, heads[0].num_query),
        other_s=_other_s(layer, cluster, lengths[0]),
    )


def two_levels(layer: Layer, cluster: Cluster, *, reach_tokens: int | None = None) -> LayerCost:
    """Return the cost with heads divided inside a node, and queries divided among nodes.

    Each node has L / R of the tokens. Its keys and values go around a ring of R nodes, every GPU
    to its counterpart: (R - 1) / R * 2 L * (H_k / 8) * D elements. A sliding window needs only what
    is in reach on both sides of a node's own tokens, which does not grow with L / R.

    Args:
        layer: The layer.
        cluster: The GPUs.
        reach_tokens: How far before and after a token its keys may be; None for everywhere.
    """
    nodes = cluster.nodes
    ranks = cluster.gpus // nodes
    of_node = replace(layer, video_tokens=-(-layer.video_tokens // nodes))
    inside = ulysses(of_node, replace(cluster, gpus=ranks))
    share = head_shares(layer.heads, layer.key_heads, ranks)[0]
    passed_tokens, turns = (nodes - 1) * of_node.video_tokens, nodes - 1
    if reach_tokens is not None:
        turns = min(2, turns)
        passed_tokens = min(turns * reach_tokens, passed_tokens)
    passed = passed_tokens * 2 * len(share.key) * layer.vector_bytes
    rate = cluster.between_bytes_per_s * cluster.link_efficiency
    return replace(
        inside,
        passed_bytes=passed,
        passed_s=passed / rate + turns * cluster.collective_s,
        attention_s=_attention_s(layer, cluster, of_node.video_tokens, share.num_query),
    )


@dataclass(frozen=True)
class _Exchange:
    """One all-to-all: how many vectors of a head each rank sends to each other."""

    amount: Callable[[int, int], int]
    vector_bytes: int
    cluster: Cluster

    def sent(self, rank: int) -> int:
        return sum(self.amount(rank, other) for other in self._others(rank)) * self.vector_bytes

    def seconds(self) -> float:
        # Both kinds of links, and both directions of each, work at the same time.
        slowest = max(
            self._most(is_inside) / rate
            for is_inside, rate in (
                (True, self.cluster.inside_bytes_per_s),
                (False, self.cluster.between_bytes_per_s),
            )
        )
        return slowest / self.cluster.link_efficiency + self.cluster.collective_s

    def _most(self, is_inside: bool) -> int:
        """Most bytes that a rank sends or receives over one kind of link."""
        most = 0
        for rank in range(self.cluster.gpus):
            others = [
                each
                for each in self._others(rank)
                if self.cluster.is_inside(rank, each) is is_inside
            ]
            out = sum(self.amount(rank, other) for other in others)
            most = max(most, out, sum(self.amount(other, rank) for other in others))
        return most * self.vector_bytes

    def _others(self, rank: int) -> Iterator[int]:
        return (each for each in range(self.cluster.gpus) if each != rank)


def _vectors(share: HeadShare) -> int:
    """How many vectors of a token go to the rank of these heads: q, and k and v of its keys."""
    return share.num_query + 2 * len(share.key)


def _attention_s(layer: Layer, cluster: Cluster, video_queries: int, heads: int) -> float:
    text = layer.text_tokens
    pairs = (video_queries + text) * (layer.video_tokens + text)
    flops = attention_flops(1, 1, heads, layer.head_dim) * pairs * layer.density
    return flops / (layer.sparse_efficiency * cluster.attention_tflops * 1e12)


def _other_s(layer: Layer, cluster: Cluster, video_tokens: int) -> float:
    flops = (video_tokens + layer.text_tokens) * layer.other_flops_per_token
    return flops / (cluster.product_tflops * 1e12)
