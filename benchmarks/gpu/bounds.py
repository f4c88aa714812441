"""What a case costs at least: arithmetic, memory traffic, and the time both take at peak."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.environment import peaks

BACKWARD_FACTOR = 2.5
"""Five products instead of two: scores again, dP, dV, dQ, dK."""


def bound(
    *, pairs: int, tokens: int, heads: int, head_dim: int, backward: bool, chip: str
) -> dict[str, Any]:
    """Return the least work of a case and the time it takes at the chip's peak.

    Args:
        pairs: Attended (query, key) token pairs of all heads.
        tokens: Length of the sequence.
        heads: Number of heads.
        head_dim: Size of a head.
        backward: Whether it is the backward pass; the forward pass is then not counted.
        chip: Name of the chip.

    Returns:
        Operations, bytes (every input read once and every output written once, bfloat16 and a
        float32 log-sum-exp), milliseconds and what limits them; null without a known peak.
    """
    flop = 4 * head_dim * pairs * (BACKWARD_FACTOR if backward else 1)
    tensors = 8 if backward else 4
    traffic = heads * tokens * (2 * head_dim * tensors + 4)
    tflops, bandwidth = peaks(chip)
    times = {
        "arithmetic": None if tflops is None else flop / tflops / 1e9,
        "memory": None if bandwidth is None else traffic / bandwidth / 1e9,
    }
    known = {name: value for name, value in times.items() if value is not None}
    limit = max(known, key=known.__getitem__) if known else None
    return {
        "flop": flop,
        "bytes": traffic,
        "milliseconds": known[limit] if limit else None,
        "limited_by": limit,
    }
