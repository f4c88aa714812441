"""Call-time metadata: nested, restored, and private to a thread or a task."""

from __future__ import annotations

import asyncio
import threading

import pytest

import compiled_sparse as cs
from compiled_sparse.errors import LayoutError
from compiled_sparse.metadata import LayoutMetadata
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
                assert current_layout() == LayoutMetadata((6, 7))
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
    with pytest.raises(LayoutError, match="metadata without a grid"), cs.metadata(text=cs.Text(1)):
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
