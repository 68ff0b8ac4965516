"""Groups of ranges read over HTTP and handed to decode threads, without a task or a future for any.

A group is what one decode needs: some ranges of one object. Groups are asked for in order and
admitted in that order within a budget of bytes, which a group holds until it has been decoded.
Threads take what is there, several groups at a time when they fall behind: the busier they are,
the less handing over costs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from online_patching.stores.http import HttpStore, RangeRead

_MOST_AT_ONCE = 8


class Group:
    """Ranges (start, stop) of the object `key`; `tag` is the asker's. Then `bodies`, or an `error`."""

    __slots__ = ("bodies", "error", "key", "left", "ranges", "reads", "size_bytes", "tag", "token")

    def __init__(
        self, key: str, token: str, ranges: Sequence[tuple[int, int]], tag: Any = None
    ) -> None:
        self.key, self.token, self.ranges, self.tag = key, token, ranges, tag
        self.size_bytes = sum(stop - start for start, stop in ranges)
        self.bodies: list[bytes] = [b""] * len(ranges)
        self.error: Exception | None = None
        self.left = len(ranges)
        self.reads: list[RangeRead] = []


class Feed:
    """Reads groups and calls `take` with those that are there, in decode threads.

    `loop` runs `store`; `submit` starts a callable in a decode thread, of which at most `threads` work
    for the feed at a time. `take` must not raise. A group with an `error` is handed over like others.
    `peak` is the most bytes that were held at once.
    """

    def __init__(
        self,
        store: HttpStore,
        loop: Any,
        submit: Callable[[Callable[[], None]], object],
        take: Callable[[list[Group]], None],
        *,
        threads: int,
        limit_bytes: int,
    ) -> None:
        self._store, self._loop, self._submit, self._take = store, loop, submit, take
        self._threads, self._limit = threads, limit_bytes
        self.in_flight = self.peak = 0
        self._waiting: deque[Group] = deque()  # touched on the loop only, as is _reading
        self._reading: set[Group] = set()
        self._there: deque[Group] = deque()  # under the lock
        self._working = 0
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, groups: Sequence[Group]) -> None:
        """Begin to read groups, from any thread: one wake-up of the loop for all of them."""
        self._loop.call_soon_threadsafe(self._asked, groups)

    def close(self) -> None:
        """Forget every group that is not there yet. Call it on the loop."""
        self._closed = True
        self._waiting.clear()
        for group in self._reading:
            for read in group.reads:
                read.cancel()
        self._reading.clear()

    # --- on the loop ---------------------------------------------------------------------------

    def _asked(self, groups: Sequence[Group]) -> None:
        if not self._closed:
            self._waiting.extend(groups)
            self._admit()

    def _admit(self) -> None:
        """Start waiting groups in their order; one larger than the budget goes alone."""
        while self._waiting:
            size = self._waiting[0].size_bytes
            if self.in_flight and self.in_flight + size > self._limit:
                return
            self.in_flight += size
            self.peak = max(self.peak, self.in_flight)
            self._start(self._waiting.popleft())

    def _start(self, group: Group) -> None:
        self._reading.add(group)
        try:
            for number, (start, stop) in enumerate(group.ranges):
                done = partial(self._answered, group, number)
                group.reads.append(self._store.start(group.key, start, stop, group.token, done))
        except Exception as error:  # nobody else would hear of it: the loop called us
            return self._failed(group, error)
        if not group.ranges:
            self._complete(group)
        return None

    def _answered(
        self, group: Group, number: int, body: bytes | None, error: Exception | None
    ) -> None:
        group.left -= 1
        if error is not None:
            return self._failed(group, error)
        group.bodies[number] = body or b""
        if not group.left:
            self._complete(group)
        return None

    def _failed(self, group: Group, error: Exception) -> None:
        group.error, group.left = error, 0
        for read in group.reads:  # the rest of it is of no use
            read.cancel()
        self._complete(group)

    def _complete(self, group: Group) -> None:
        self._reading.discard(group)
        group.reads.clear()
        with self._lock:
            self._there.append(group)
            idle = self._working < self._threads
            self._working += idle
        if idle:
            try:
                self._submit(self._work)
            except RuntimeError:  # the pool takes nothing any more: everything is being closed
                self._closed = True

    def _decoded(self, size_bytes: int) -> None:
        self.in_flight -= size_bytes
        self._admit()

    # --- in decode threads ---------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                share = -(-len(self._there) // self._threads)
                groups = [self._there.popleft() for _ in range(min(share, _MOST_AT_ONCE))]
                if not groups:
                    self._working -= 1
                    return
            self._take(groups)
            size = sum(group.size_bytes for group in groups)
            groups.clear()  # its bodies are free before others take their room
            self._loop.call_soon_threadsafe(self._decoded, size)
