"""Groups of ranges: asked in order, within the budget until decoded, several at a time when threads lag."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from online_patching import errors
from online_patching.stores import LoopThread
from online_patching.stores.feed import Feed, Group
from online_patching.stores.range_connection import Done


class Reads:
    """A store that answers when it is told to; `started` are (start, stop, done) in the order of asking."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int, Done]] = []
        self.cancelled: list[int] = []
        self.refused: dict[int, Exception] = {}  # by start: what asking raises

    def start(self, key: str, start: int, stop: int | None, token: str, done: Done) -> Reads.One:
        if start in self.refused:
            raise self.refused[start]
        self.started.append((start, stop, done))
        return Reads.One(self, start)

    class One:
        def __init__(self, reads: Reads, start: int) -> None:
            self.reads, self.at = reads, start

        def cancel(self) -> None:
            self.reads.cancelled.append(self.at)


class Rig:
    def __init__(self, limit_bytes: int, threads: int = 1) -> None:
        self.loop, self.reads = LoopThread(), Reads()
        self.pool = ThreadPoolExecutor(threads)
        self.taken: list[list[Group]] = []
        self.gate = threading.Semaphore(0)  # each `take` needs one

        def take(groups: list[Group]) -> None:
            assert self.gate.acquire(timeout=20)
            self.taken.append(list(groups))

        self.feed = Feed(
            lambda key: self.reads,
            self.loop.loop,
            self.pool.submit,
            take,
            threads=threads,
            limit_bytes=limit_bytes,
        )

    def on_loop(self, work: object = None, *args: object) -> None:
        """Run on the loop after all that has been sent there."""

        async def call() -> None:
            await asyncio.sleep(0)
            if work is not None:
                work(*args)  # type: ignore[operator]

        self.loop.run(call())

    def answer(self, number: int, error: Exception | None = None) -> None:
        start, stop, done = self.reads.started[number]
        self.on_loop(done, None if error else bytes(stop - start), error)

    def decode(self, times: int = 1) -> None:
        """Let `times` calls of `take` end."""
        want = len(self.taken) + times
        self.gate.release(times)
        while len(self.taken) < want:
            threading.Event().wait(0.001)
        self.on_loop()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(limit_bytes=100)
    yield made
    made.gate.release(100)
    made.pool.shutdown()
    made.loop.close()


def group(*sizes: int, tag: object = None) -> Group:
    return Group([("k", 1000 * i, 1000 * i + size, "") for i, size in enumerate(sizes)], tag)


def tags(groups: list[Group]) -> list[object]:
    return [one.tag for one in groups]


def test_groups_start_in_order_and_hold_their_bytes_until_they_are_decoded(rig: Rig) -> None:
    rig.feed.ask([group(40, 20, tag="a"), group(50, tag="b"), group(30, tag="c")])
    rig.on_loop()
    assert len(rig.reads.started) == 2  # c would fit beside a, but b asked first
    rig.answer(0)
    rig.answer(1)
    assert len(rig.reads.started) == 2  # there, not decoded
    rig.decode()
    assert tags(rig.taken[0]) == ["a"]
    assert [len(body) for body in rig.taken[0][0].bodies] == [40, 20]
    assert len(rig.reads.started) == 4
    assert rig.feed.peak == 80


def test_a_group_larger_than_the_budget_goes_alone(rig: Rig) -> None:
    rig.feed.ask([group(10, tag="a"), group(300, tag="b"), group(10, tag="c")])
    rig.on_loop()
    for number in range(3):
        assert len(rig.reads.started) == number + 1
        rig.answer(number)
        rig.decode()
    assert [tags(groups) for groups in rig.taken] == [["a"], ["b"], ["c"]]


def test_what_arrives_while_threads_are_busy_is_taken_together(rig: Rig) -> None:
    rig.feed.ask([group(5, tag=i) for i in range(20)])
    rig.on_loop()
    for number in range(20):
        rig.answer(number)
    rig.decode(4)
    assert [len(groups) for groups in rig.taken] == [1, 8, 8, 3]
    assert [tag for groups in rig.taken for tag in tags(groups)] == [*range(20)]
    assert rig.feed.in_flight == 0


def test_an_error_ends_its_group_and_the_rest_of_it_is_not_read(rig: Rig) -> None:
    gone = errors.ObjectNotFoundError("k", "gone")
    rig.feed.ask([group(10, 10, 10, tag="a"), group(0, tag="b")])
    rig.on_loop()
    rig.answer(1, gone)
    rig.decode()
    assert [one.error for one in rig.taken[0]] == [gone]
    assert 0 in rig.reads.cancelled
    assert 2000 in rig.reads.cancelled
    assert rig.feed.in_flight == 0


def test_a_group_that_cannot_be_asked_for_is_handed_over_with_its_error(rig: Rig) -> None:
    """Raised into the loop it would be lost, and who waits for the group would wait for ever."""
    bad = errors.StoreError("k", "is not a URL.")
    rig.reads.refused[1000] = bad
    rig.feed.ask([group(10, 10, tag="a"), group(20, tag="b")])
    rig.on_loop()
    rig.answer(1)  # b's
    rig.decode(2)
    taken = [one for groups in rig.taken for one in groups]
    assert [(one.tag, one.error) for one in taken] == [("a", bad), ("b", None)]
    assert rig.reads.cancelled == [0]
    assert rig.feed.in_flight == 0


def test_a_group_of_nothing_is_there_at_once(rig: Rig) -> None:
    rig.feed.ask([group(tag="empty")])
    rig.decode()
    assert tags(rig.taken[0]) == ["empty"]


def test_a_closed_feed_forgets_what_is_on_its_way(rig: Rig) -> None:
    rig.feed.ask([group(60, tag="a"), group(60, tag="b")])
    rig.on_loop()
    rig.on_loop(rig.feed.close)
    assert rig.reads.cancelled == [0]
    rig.feed.ask([group(10)])
    rig.on_loop()
    assert len(rig.reads.started) == 1
