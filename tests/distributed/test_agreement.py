"""Ranks that agree, that differ, that fail before and that never come."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from process_groups import as_seen_here
from process_groups import lone_group
from processes import run_processes
from processes import values
from torch import distributed
from torch.distributed import HashStore

from compiled_sparse.distributed import agreement
from compiled_sparse.distributed.agreement import abandon
from compiled_sparse.distributed.agreement import agree
from compiled_sparse.errors import DistributedError
from compiled_sparse.sharding import SequenceGroup

FACTS = {"policy": "sta", "grid": "(8, 24, 40)"}
SHORT = timedelta(seconds=4)


def caught(group: SequenceGroup, facts: dict[str, str], **options: timedelta) -> DistributedError:
    with pytest.raises(DistributedError) as found:
        agree(group, "the first call", facts, **options)
    return found.value


def _keys_after_agreeing() -> int:
    store = distributed.group.WORLD.get_group_store()
    keys = store.num_keys()
    distributed.barrier()
    for _ in range(3):
        agree(as_seen_here(), "the first call", FACTS)
    distributed.barrier()
    return store.num_keys() - keys


def test_equal_ranks_agree_and_leave_nothing_in_the_store() -> None:
    assert values(3, _keys_after_agreeing) == [0, 0, 0]


def _differing(facts: dict[int, dict[str, str]]) -> tuple[str, str, float]:
    started = time.monotonic()
    error = caught(as_seen_here(), facts.get(distributed.get_rank(), FACTS))
    return error.problem, error.got, time.monotonic() - started


def test_every_rank_says_what_differs_and_where() -> None:
    other = {1: {**FACTS, "policy": "vsa"}, 2: {**FACTS, "grid": "(8, 30, 52)"}}
    first, second, third = values(3, _differing, other)
    assert {each[0] for each in (first, second, third)} == {
        "the ranks disagree about the first call"
    }
    assert first[1] == (
        "rank 0 (global 0): policy: 'sta' on this rank, 'vsa' on rank 1 (global 1); "
        "grid: '(8, 24, 40)' on this rank, '(8, 30, 52)' on rank 2 (global 2)"
    )
    assert "policy: 'vsa' on this rank, 'sta' on rank 0" in second[1]
    assert "grid: '(8, 30, 52)' on this rank, '(8, 24, 40)' on rank 0" in third[1]
    assert max(each[2] for each in (first, second, third)) < 20


def _killed_before(killed: int) -> tuple[str, str]:
    distributed.barrier()  # the others come at one time, however long it took to start them
    if distributed.get_rank() == killed:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    error = caught(as_seen_here(), FACTS, timeout=SHORT)
    return error.problem, error.got


def test_a_rank_that_never_comes_is_named_on_every_other() -> None:
    *others, dead = run_processes(3, _killed_before, 2)
    assert dead.exit_code == -signal.SIGKILL
    for each in others:
        problem, got = each.value
        assert problem == "rank 2 (global 2) did not come to the first call"
        assert got.startswith("1 of 3 ranks missing when rank ")


def _abandoned_by(failing: int) -> tuple[str, float] | None:
    if distributed.get_rank() == failing:
        abandon(as_seen_here(), "the first call", ValueError("no kernel\nfor this head size"))
        return None
    started = time.monotonic()
    error = caught(as_seen_here(), FACTS)
    return str(error), time.monotonic() - started


def test_a_rank_that_fails_before_is_heard_at_once() -> None:
    *others, _ = values(3, _abandoned_by, 2)
    for text, seconds in others:
        assert "rank 2 (global 2) failed before the first call" in text
        assert "ValueError: no kernel for this head size" in text
        assert seconds < 20


def _served_by_the_first(how: str) -> str:
    rank, before = distributed.get_rank(), distributed.group.WORLD.get_group_store()
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        before.set("port", str(store.port))
    else:
        store = distributed.TCPStore("127.0.0.1", int(before.get("port")), is_master=False)
    distributed.destroy_process_group()
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        time.sleep(0.5)  # the other asks at its longest intervals by now
        if how == "abandon":
            abandon(as_seen_here(), "the first call", ValueError("no kernel"))
        else:
            caught(as_seen_here(), {"policy": "vsa"})
        os._exit(1)
    return caught(as_seen_here(), FACTS).got


@pytest.mark.parametrize(("how", "told"), [("abandon", "no kernel"), ("differ", "'vsa' on rank 0")])
def test_the_reason_is_heard_also_of_the_rank_that_serves_the_store(how: str, told: str) -> None:
    first, second = run_processes(2, _served_by_the_first, how)
    assert (first.exit_code, second.error) == (1, "")
    assert told in second.value


def _rounds() -> list[str]:
    """Five rounds at different speeds; the third is abandoned, and rank 0 differs in the last."""
    rank, seen = distributed.get_rank(), []
    for turn in range(5):
        time.sleep(0.02 * ((turn + rank) % 3))
        try:
            if (turn, rank) == (2, 1):
                abandon(as_seen_here(), f"round {turn}", ValueError("lost"))
                continue
            agree(as_seen_here(), f"round {turn}", {"turn": "x" if (turn, rank) == (4, 0) else "y"})
        except DistributedError as error:
            seen.append(error.problem)
    return seen


def test_the_nth_handshake_meets_the_nth_also_after_a_failure() -> None:
    last = "the ranks disagree about round 4"
    failed = "rank 1 (global 1) failed before round 2"
    assert values(3, _rounds) == [[failed, last], [last], [failed, last]]


def _two_groups() -> str:
    rank = distributed.get_rank()
    pairs = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    mine = as_seen_here(pairs[rank % 2])
    for _ in range(2 + rank % 2):  # other numbers of handshakes in the two groups
        agree(mine, "the pair's call", {"pair": str(rank % 2)})
    agree(as_seen_here(), "everyone's call", FACTS)
    return caught(mine, {"rank": str(rank)}).got


def test_groups_do_not_disturb_each_other_and_global_numbers_are_told() -> None:
    found = values(4, _two_groups)
    assert found[3] == "rank 1 (global 3): rank: '3' on this rank, '1' on rank 0 (global 1)"
    assert "'2' on rank 1 (global 2)" in found[0]


def _two_threads() -> list[str]:
    groups = [as_seen_here(distributed.new_group([0, 1])) for _ in range(2)]
    if distributed.get_rank():
        groups.reverse()  # each thread's first handshake waits for the other rank's second thread
    done: list[str] = []

    def shake(group: SequenceGroup, pause: float) -> None:
        for turn in range(5):
            time.sleep(pause)
            agree(group, f"call {turn} of {group.name}", FACTS)
        done.append(group.name)

    threads = [
        threading.Thread(target=shake, args=(group, 0.02 * index))
        for index, group in enumerate(groups)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return sorted(done)


def test_threads_with_a_group_each_agree_side_by_side() -> None:
    first, second = values(2, _two_threads)
    assert first == second
    assert len(set(first)) == 2


def in_threads(groups: list[SequenceGroup], facts: list[dict[str, str]]) -> list[str]:
    """Let threads be the ranks, and return what each was told."""
    told = [""] * len(groups)

    def rank(index: int) -> None:
        try:
            agree(groups[index], "the first call", facts[index])
        except DistributedError as error:
            told[index] = error.got

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(groups))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return told


def test_long_values_are_compared_whole_and_shown_where_they_differ() -> None:
    base = "window " * 10_000
    early, late = base[:900] + "HERE" + base[904:], base[:-1] + "!"
    with lone_group(3) as ranks:
        same = [{"policy": base}] * 3
        assert in_threads(ranks, same) == ["", "", ""]
        told = in_threads(ranks, [{"policy": base}, {"policy": early}, {"policy": base}])
        assert "HERE" in told[0]
        assert "HERE" in told[1]
        assert len(told[0]) < 600
        told = in_threads(ranks, [{"policy": base}, {"policy": late}, {"policy": base}])
        assert told[0].count("sha256") == 2
        assert told[2].count("sha256") == 2


def test_a_fact_that_one_rank_lacks_is_a_difference() -> None:
    with lone_group(2) as ranks:
        told = in_threads(ranks, [FACTS, {"policy": "sta"}])
    assert "grid: '(8, 24, 40)' on this rank, '(nothing)' on rank 1 (global 1)" in told[0]


def test_another_version_of_the_code_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["code of sha256 a", "code of sha256 b"])
    monkeypatch.setattr(agreement, "_source_digest", lambda: next(digests))
    with lone_group(2) as ranks:
        told = in_threads(ranks, [FACTS, FACTS])
    assert all("compiled_sparse: 'code of sha256" in each for each in told)


def test_the_digest_is_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        agreement._source_digest.cache_clear()
        return agreement._source_digest()

    whole = digest()
    assert digest() == whole
    (tmp_path / "__init__.py").write_text("a = 1\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(agreement.compiled_sparse, "__file__", str(tmp_path / "__init__.py"))
        before = digest()
        (tmp_path / "__init__.py").write_text("a = 2\n", encoding="utf-8")
        assert len({whole, before, digest()}) == 3
    assert digest() == whole


def test_a_long_wait_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agreement, "_PATIENCE_S", 0.02)
    with lone_group(2) as ranks, caplog.at_level(logging.WARNING, "compiled_sparse"):
        caught(ranks[0], FACTS, timeout=timedelta(seconds=0.3))
    assert [each.getMessage() for each in caplog.records] == [
        "still waiting for rank 1 (global 1), for the first call"
    ]


def test_the_variable_is_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(agreement.TIMEOUT_VARIABLE, "0.05")
    with lone_group(2) as ranks:
        assert "rank 0 (global 0) gave up after 0." in caught(ranks[0], FACTS).got


def test_a_rank_without_a_timeout_tells_the_others() -> None:
    with lone_group(2) as ranks:
        caught(ranks[0], FACTS, timeout=timedelta(0))
        assert "timeout is no time to wait" in caught(ranks[1], FACTS).got


def test_what_cannot_be_told_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "compiled_sparse"):
        abandon(SequenceGroup("nobody's", 2, 0), "the first call", ValueError("no kernel"))
    (record,) = caplog.records
    assert "the other ranks were not told that the first call failed" in record.getMessage()


def test_a_group_made_again_starts_from_the_beginning() -> None:
    """Also where its store still holds what was left of a failure under another prefix."""
    store = HashStore()
    for turn in range(2):
        with lone_group(1, distributed.PrefixStore(str(turn), store)) as ranks:
            agree(ranks[0], "the only call", FACTS)
