"""Call-time metadata: nested, restored, and private to a thread or a task."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

import compiled_sparse as cs
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MetadataError
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.metadata import current_call
from compiled_sparse.metadata import current_layout


def test_outside_a_block_there_is_no_layout() -> None:
    assert current_layout() is None


def test_a_block_sets_the_layout_and_restores_it() -> None:
    with cs.metadata(grid_thw=(2, 3, 4), text=cs.Text(after=5)):
        assert current_layout() == LayoutMetadata((2, 3, 4), cs.Text(0, 5))
    assert current_layout() is None


def test_an_inner_block_inherits_what_it_does_not_set() -> None:
    with cs.metadata(grid_thw=(2, 3, 4), text=cs.Text(1, 5)):
        with cs.metadata(grid_thw=[6, 7]):
            assert current_layout() == LayoutMetadata((6, 7), cs.Text(1, 5))
            with cs.metadata(text=cs.Text()):
                assert current_layout() == LayoutMetadata((6, 7), cs.Text())
            with cs.metadata():
                assert current_layout() == LayoutMetadata((6, 7), cs.Text(1, 5))
        assert current_layout() == LayoutMetadata((2, 3, 4), cs.Text(1, 5))


def test_an_exception_restores_the_outer_layout() -> None:
    with cs.metadata(grid_thw=(2,)):
        with pytest.raises(KeyError), cs.metadata(grid_thw=(3,)):
            raise KeyError
        assert current_layout() == LayoutMetadata((2,))
    assert current_layout() is None


def test_a_refused_block_leaves_the_outer_layout_in_place() -> None:
    with cs.metadata(grid_thw=(2,)):
        with (
            pytest.raises(LayoutError, match="grid_thw is not a tuple of axis lengths"),
            cs.metadata(grid_thw=(0, 3)),
        ):
            pass
        assert current_layout() == LayoutMetadata((2,))


def test_text_without_a_grid_is_refused() -> None:
    with pytest.raises(LayoutError, match="without a grid"), cs.metadata(text=cs.Text(1)):
        pass


def test_a_layout_counts_video_and_text_tokens() -> None:
    assert LayoutMetadata((2, 3, 4), cs.Text(1, 5)).num_tokens == 30


def test_threads_do_not_see_each_other() -> None:
    both_inside = threading.Barrier(2, timeout=10)
    seen: dict[int, LayoutMetadata | None] = {}

    def work(number: int) -> None:
        seen[-number] = current_layout()
        with cs.metadata(grid_thw=(number,)):
            both_inside.wait()
            seen[number] = current_layout()
            both_inside.wait()

    with cs.metadata(grid_thw=(9,)):
        threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current_layout() == LayoutMetadata((9,))
    assert seen == {-1: None, -2: None, 1: LayoutMetadata((1,)), 2: LayoutMetadata((2,))}


def test_tasks_inherit_the_layout_and_do_not_see_each_other() -> None:
    seen: dict[int, list[LayoutMetadata | None]] = {1: [], 2: []}

    async def work(number: int, mine: asyncio.Event, other: asyncio.Event) -> None:
        seen[number].append(current_layout())
        with cs.metadata(grid_thw=(number,)):
            mine.set()
            await other.wait()
            seen[number].append(current_layout())

    async def main() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        with cs.metadata(grid_thw=(9,)):
            await asyncio.gather(work(1, first, second), work(2, second, first))
            assert current_layout() == LayoutMetadata((9,))

    asyncio.run(main())
    for number in (1, 2):
        assert seen[number] == [LayoutMetadata((9,)), LayoutMetadata((number,))]


def test_text_nobody_mentioned_is_not_the_same_as_no_text() -> None:
    with cs.metadata(grid_thw=(2, 3)):
        assert current_layout() == LayoutMetadata((2, 3), None)
        assert current_layout() != LayoutMetadata((2, 3), cs.Text())
    assert LayoutMetadata((2, 3), None).num_tokens == 6


# What changes from call to call.


def test_step_and_sparsity_need_no_grid_and_leave_the_layout_alone() -> None:
    with cs.metadata(step=3, num_steps=50, sparsity=0.5):
        assert current_layout() is None
        assert current_call() == CallMetadata(3, 50, 0.5)
        with cs.metadata(grid_thw=(2, 3)), cs.metadata(step=4):
            assert current_call() == CallMetadata(4, 50, 0.5)
            assert current_layout() == LayoutMetadata((2, 3))
        assert current_call() == CallMetadata(3, 50, 0.5)
    assert current_call() == CallMetadata()


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": -1},
        {"step": True},
        {"step": 1.0},
        {"num_steps": 0},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"step": 5, "num_steps": 5},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MetadataError), cs.metadata(**wrong):
        pass
    assert current_call() == CallMetadata()


def _in_new_context(function: Any) -> Any:
    """Run where a step that is set for good is forgotten afterwards."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(("num_steps", "pipe_steps"), [(3, None), (None, 3), (7, 3)])
def test_the_callback_counts_steps_and_starts_over(
    num_steps: int | None, pipe_steps: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    def sample() -> list[int | None]:
        pipe = SimpleNamespace(num_timesteps=pipe_steps)
        seen = []
        callback = cs.step_callback(num_steps)
        for step in range(3):
            seen.append(current_call().step)
            kwargs = {"latents": step}
            assert callback(pipe, step, 1000 - step, kwargs) is kwargs
            assert current_call().num_steps == 3
            assert num_steps != 7 or "pipeline of 3 steps" in caplog.text
        assert len(caplog.records) == (num_steps == 7)
        return [*seen, current_call().step]

    assert _in_new_context(sample) == [0, 1, 2, 0]


def test_a_callback_starts_anew_with_the_next_run() -> None:
    def sample() -> list[int | None]:
        callback, seen = cs.step_callback(), []
        for length, stop in ((5, 2), (3, 3), (4, 4)):
            pipe = SimpleNamespace(num_timesteps=length)
            for step in range(stop):
                callback(pipe, step, 0, {})
                seen.append(current_call().step)
        return seen

    assert _in_new_context(sample) == [1, 2, 1, 2, 0, 1, 2, 3, 0]


def test_a_callback_says_the_sparsity_of_each_step() -> None:
    def sample() -> list[float | None]:
        callback = cs.step_callback(3, sparsity=lambda step: (0.5, 0.25, 0.0)[step])
        seen = [current_call().sparsity]
        for step in range(3):
            callback(None, step, 0, {})
            seen.append(current_call().sparsity)
        return seen

    assert _in_new_context(sample) == [0.5, 0.25, 0.0, 0.5]
    with pytest.raises(MetadataError, match="sparsity"):
        cs.step_callback(3, sparsity=lambda _step: 1.5)


def test_a_callback_made_inside_a_block_ends_with_it() -> None:
    with cs.metadata(grid_thw=(2, 3), sparsity=0.5):
        cs.step_callback(4)(None, 1, 0, {})
        assert current_call() == CallMetadata(2, 4, 0.5)
        assert current_layout() == LayoutMetadata((2, 3))
    assert current_call() == CallMetadata()
