"""Ring attention in several processes: values, gradients, messages, compiled and not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from processes import values
from ring_cases import Found
from ring_cases import RingCase
from ring_cases import graphs_of
from ring_cases import in_rings
from ring_cases import on_one
from ring_cases import recorded
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse.distributed.ring import ring_pattern
from compiled_sparse.distributed.ring_schedule import Message
from compiled_sparse.distributed.ring_schedule import Step
from compiled_sparse.distributed.ring_schedule import backward_messages
from compiled_sparse.distributed.ring_schedule import ring_schedule

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
    RingCase(config=cs.SWBA(block=8, window=3), grid=(12, 4, 4)),
    RingCase(config=cs.SWBA(block=8, window=99), grid=(12, 4, 4), hidden=tuple(range(8))),
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_values_and_gradients_are_those_of_one_process(size: int) -> None:
    check(CASES, values(size, in_rings, CASES))


def test_one_rank_takes_any_grid() -> None:
    config = cs.STA(window_thw=(3, 1, 3), tile_thw=(2, 3, 2))
    case = RingCase(config=config, grid=(5, 7, 3), text=TEXT)
    ((found,),) = values(1, in_rings, [case])
    torch.testing.assert_close(found, on_one(case))


def test_the_automatic_tile_is_that_of_the_whole_grid() -> None:
    case = RingCase(config=cs.STA(window_thw=(1, 3, 3), tile_thw="auto"), grid=(24, 4, 4))
    assert case.config.resolve_tile(case.grid)[0] == 12
    check([case], values(2, in_rings, [case]))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_same_text_to_the_bit(size: int) -> None:
    cases = [case for case in CASES if case.text == TEXT]
    first, *others = values(size, in_rings, [replace(each, dtype=torch.float32) for each in cases])
    assert others
    for other in others:
        for (one, _), (another, _) in zip(first, other, strict=True):
            assert torch.equal(one[:, :, : TEXT.before], another[:, :, : TEXT.before])
            assert torch.equal(one[:, :, -TEXT.after :], another[:, :, -TEXT.after :])


def test_half_precision_is_as_close_as_on_one_process() -> None:
    cases = [replace(CASES[place], dtype=torch.bfloat16) for place in (1, 3, 7)]
    by_rank = values(3, in_rings, cases)
    for number, case in enumerate(cases):
        wholes = wholes_of(case, [found[number] for found in by_rank])
        plain_out, plain_gradients = on_one(case)
        out, gradients = on_one(case, compute=torch.float64)
        pairs = zip((plain_out, *plain_gradients), (out, *gradients), strict=True)
        for whole, (plain, exact) in zip(wholes, pairs, strict=True):
            assert (whole - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("size", [2, 4])
def test_messages_are_those_of_the_schedule(size: int) -> None:
    by_rank = values(size, recorded, CASES)
    for number, case in enumerate(CASES):
        pattern = ring_pattern(case.config, case.grid, size)
        steps = ring_schedule(pattern)
        backward = backward_messages(steps)
        layer = 2 * case.batch * case.key_heads * pattern.layer_tokens * 8
        has_text = case.text != cs.Text()
        order = [*["send"] * len(steps), *["gather"] * has_text]
        order += [*["sum"] * has_text, *["send"] * len(backward)]
        for rank, (found, received) in enumerate(ranks[number] for ranks in by_rank):
            assert [word for word in found if word in ("send", "gather", "sum")] == order, case
            assert found.count("wait") == len(order)
            expected = [
                layer * (keys_brought(each.keys, rank) + gradients_brought(each.home, rank))
                for each in (*(Message(keys=step) for step in steps), *backward)
            ]
            assert received == expected, case


def keys_brought(step: Step | None, rank: int) -> int:
    """How many layers of keys a step brings to a rank."""
    part = None if step is None else step.parts[rank]
    return 0 if part is None else part.count


def gradients_brought(step: Step | None, rank: int) -> int:
    """How many layers of gradients go home to a rank: as many as it has sent keys."""
    sent = None if step is None else step.sent_by(rank)
    return 0 if sent is None else sent[1].count


def test_the_next_message_is_under_way_while_a_step_is_computed() -> None:
    order, _ = values(3, recorded, CASES[:1])[0][0]
    forward = ["send", "attend", "wait", "send", "attend", "wait", "attend"]
    backward = ["send", "back", "wait", "send", "back", "wait", "send", "back"]
    assert order == [*forward, *backward, "wait", "send", "wait"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_compilers_keep_every_message_of_every_rank_in_order(size: int) -> None:
    cases = [replace(CASES[place], dtype=torch.float32) for place in (3, 8)]
    by_rank = values(size, graphs_of, cases)
    for number, case in enumerate(cases):
        steps = ring_schedule(ring_pattern(case.config, case.grid, size))
        has_text = case.text != cs.Text()
        for found in by_rank:
            forward, backward = found[number]
            assert [forward, backward] == by_rank[0][number]
            assert len(forward) == 2 * (len(steps) + has_text)
            assert len(backward) == 2 * (len(backward_messages(steps)) + has_text)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("size", [2, 4])
def test_compiled_in_one_graph_it_is_the_same(size: int, compiler: str) -> None:
    cases = [replace(CASES[place], dtype=torch.float32) for place in (1, 3, 4, 7, 8)]
    check(cases, values(size, in_rings, cases, compiler))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_gives_the_same(dtype: torch.dtype) -> None:
    cases = [replace(CASES[place], dtype=dtype) for place in (4, 8)]
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    check(cases, values(4, in_rings, cases, "inductor", limit_s=280.0), **tolerance)


def check(cases: list[RingCase], by_rank: list[list[Found]], **tolerance: float) -> None:
    """Compare what ranks found with the reference on one process."""
    for number, case in enumerate(cases):
        out, gradients = on_one(case)
        wholes = wholes_of(case, [found[number] for found in by_rank])
        for whole, expected in zip(wholes, (out, *gradients), strict=True):
            torch.testing.assert_close(whole, expected, msg=f"{case}: {{}}".format, **tolerance)


def wholes_of(case: RingCase, found: list[Found]) -> list[Tensor]:
    """Return the whole output, and the whole gradients of q, k and v."""
    outs = [case.counted_once(out, rank) for rank, (out, _) in enumerate(found)]
    shares = zip(*(gradients for _, gradients in found), strict=True)
    return [case.whole_of(outs), *(case.whole_of(list(each)) for each in shares)]
