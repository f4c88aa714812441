"""Ring attention in several processes: values, gradients, messages, compiled and not."""

from __future__ import annotations

import pytest
import torch
from processes import values
from ring_cases import RingCase
from ring_cases import in_rings
from ring_cases import on_one

import compiled_sparse as cs

TEXT = cs.Text(before=5, after=9)

CASES = [
    RingCase(config=cs.Dense(), grid=(12, 5, 3)),
    RingCase(config=cs.Dense(), grid=(12, 5, 3), text=TEXT, heads=6, key_heads=2),
    RingCase(config=cs.STA(window_thw=(3, 3, 1), tile_thw=(1, 3, 4)), grid=(12, 5, 7)),
    RingCase(config=cs.STA(window_thw=(1, 1, 3), tile_thw=(1, 3, 4)), grid=(12, 5, 7), text=TEXT),
    RingCase(
        config=cs.STA(window_thw=((3, 1, 1), (5, 3, 3), (99, 1, 1)), tile_thw=(1, 2, 2)),
        grid=(12, 3, 5),
        text=cs.Text(after=7),
        hidden=(3, 4, 5, *range(180, 187)),
        scale=0.5,
    ),
    RingCase(config=cs.STA(window_thw=(5,), tile_thw=(4,)), grid=(96,), key_heads=1),
    RingCase(config=cs.STA(window_thw=(3, 3), tile_thw=(2, 4)), grid=(24, 6), text=TEXT),
    RingCase(
        config=cs.STA(window_thw=(3, 3, 3), tile_thw="auto"),
        grid=(144, 4, 4),
        heads=1,
        key_heads=1,
        batch=1,
    ),
    RingCase(config=cs.SWBA(block=8, window=3), grid=(12, 4, 4)),
    RingCase(config=cs.SWBA(block=8, window=99), grid=(12, 4, 4), hidden=tuple(range(8))),
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_values_and_gradients_are_those_of_one_process(size: int) -> None:
    by_rank = values(size, in_rings, CASES)
    for number, case in enumerate(CASES):
        out, gradients = on_one(case)
        found = [ranks[number] for ranks in by_rank]
        whole = case.joined([each for each, _ in found], sums_text=False)
        torch.testing.assert_close(whole, out, msg=lambda text, case=case: f"{case}\n{text}")
        for place, expected in enumerate(gradients):
            joined = case.joined([grads[place] for _, grads in found], sums_text=True)
            torch.testing.assert_close(
                joined, expected, msg=lambda text, case=case: f"{case}\n{text}"
            )
