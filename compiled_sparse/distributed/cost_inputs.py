"""What the cost of sequence parallelism is computed from: GPUs, links, and a model's layer."""

from __future__ import annotations

from dataclasses import dataclass

from compiled_sparse.chips import chip
from compiled_sparse.errors import ConfigError
from compiled_sparse.geometry import ModelGeometry

NVLINK_4_BYTES_PER_S = 450e9
"""Data sheet of the H100 SXM: NVLink 900 GB/s, the sum of both directions."""

INFINIBAND_NDR_BYTES_PER_S = 50e9
"""400 Gb/s each way; the DGX H100 has one such adapter for each of its 8 GPUs."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and what connects them. Bandwidths are of one GPU, in one direction, in bytes/s.

    Args:
        gpus: Number of GPUs; whole nodes, or a part of one.
        gpus_per_node: Of a node.
        inside_bytes_per_s: To GPUs of the same node.
        between_bytes_per_s: To GPUs of other nodes, at the same time.
        link_efficiency: What exchanges reach of the two; assumed.
        collective_s: Latency of one collective, in seconds; assumed.
        attention_tflops: What dense attention reaches on a GPU, in TFLOP/s.
        product_tflops: What products with weights reach; assumed.

    Raises:
        ConfigError: if the GPUs are not whole nodes, or a part of one.
    """

    gpus: int
    gpus_per_node: int = 8
    inside_bytes_per_s: float = NVLINK_4_BYTES_PER_S
    between_bytes_per_s: float = INFINIBAND_NDR_BYTES_PER_S
    link_efficiency: float = 0.7
    collective_s: float = 30e-6
    attention_tflops: float = chip("h100").attention_tflops
    product_tflops: float = 600.0

    def __post_init__(self) -> None:
        if self.gpus < 1 or (self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node):
            raise ConfigError(
                "these GPUs are not whole nodes",
                got=f"{self.gpus} GPUs, {self.gpus_per_node} per node",
                expected="1 to all GPUs of one node, or a multiple of that",
                next_step="round gpus, or correct gpus_per_node",
            )

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.gpus // self.gpus_per_node)

    def is_inside(self, rank: int, other: int) -> bool:
        """Whether two ranks are in one node."""
        return rank // self.gpus_per_node == other // self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its attention over the sequence, and what else it computes for each token.

    Args:
        video_tokens: Divided among ranks.
        text_tokens: In the same sequence; every rank has all of them.
        heads: Query heads.
        key_heads: Key heads.
        head_dim: Channels of a head.
        element_bytes: Of an element of q, k, v and the output.
        density: Of the attention, from above 0 to 1.
        sparse_efficiency: What its kernel reaches of dense attention's rate.
        other_flops_per_token: Of products with weights and of cross-attention.
    """

    video_tokens: int
    text_tokens: int = 0
    heads: int
    key_heads: int
    head_dim: int
    element_bytes: int = 2
    density: float = 1.0
    sparse_efficiency: float = 1.0
    other_flops_per_token: float = 0.0

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token in one head."""
        return self.head_dim * self.element_bytes


def layer_of(model: ModelGeometry, grid_thw: tuple[int, int, int]) -> Layer:
    """Return a dense layer of a published model.

    Args:
        model: The model.
        grid_thw: Its token grid.
    """
    text = model.text.before + model.text.after
    tokens = model.num_tokens(grid_thw)
    return Layer(
        video_tokens=tokens - text,
        text_tokens=text,
        heads=model.heads,
        key_heads=model.heads,
        head_dim=model.head_dim,
        other_flops_per_token=model.other_flops(grid_thw) / (model.layers * tokens),
    )
