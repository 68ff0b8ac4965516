"""Groups of reads from remote stores, handed to decode threads without a task or a future for any.

A group is what one decode needs: ranges of some objects, or whole ones. Groups are asked for in order and
admitted in that order within a budget of bytes, which a group holds until it has been decoded.
Threads take what is there, several groups at a time when they fall behind: the busier they are,
the less handing over costs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from online_patching.errors import ObjectNotFoundError
from online_patching.stores.awaited import Started, Starter

_MOST_AT_ONCE = 8

Read = tuple[str, int, int | None, str]
"""Key, first byte, the one past the last (None: all of the object), version token."""


class Group:
    """Some `reads`; `tag` is the asker's. Then `bodies`, or an `error`.

    `size_bytes` is what it holds of the budget, where that is not what its ranges say. A whole object that
    is absent has no body, None; one that is there and empty has b"". `before` is awaited ahead of the reads;
    what it raises is the group's error.
    """

    __slots__ = (
        "before", "bodies", "error", "left", "looked", "reads", "size_bytes", "started", "tag",
    )  # fmt: skip

    def __init__(
        self,
        reads: Sequence[Read],
        tag: Any = None,
        size_bytes: int | None = None,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.reads, self.tag, self.before = reads, tag, before
        ranges = sum((stop or 0) - start for _, start, stop, _ in reads)
        self.size_bytes = ranges if size_bytes is None else size_bytes
        self.bodies: list[bytes | None] = []
        self.error: Exception | None = None
        self.left = 0
        self.looked = False
        self.started: list[Started] = []


class Feed:
    """Reads groups and calls `take` with those that are there, in decode threads.

    `store_of` names the store of a key, of those that live on `loop`; `submit` starts a callable in a decode
    thread, of which at most `threads` work for the feed at a time. `take` must not raise. A group with an
    `error` is handed over like others. `look`, which must not raise either, is called in a decode
    thread before anything is asked of a store, and may leave fewer of a group's reads to do. `peak` is the
    most bytes that were held at once.
    """

    def __init__(
        self,
        store_of: Callable[[str], Starter],
        loop: Any,
        submit: Callable[[Callable[[], None]], object],
        take: Callable[[list[Group]], None],
        *,
        threads: int,
        limit_bytes: int,
        look: Callable[[Group], None] | None = None,
    ) -> None:
        self._store_of, self._loop, self._submit, self._take = store_of, loop, submit, take
        self._threads, self._limit, self._look = threads, limit_bytes, look
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
            for read in group.started:
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
            group = self._waiting.popleft()
            if self._look is None:
                self._start(group)
            else:
                self._hand_over(group)

    def _looked_for(self, groups: list[Group]) -> None:
        """Read what was not found of these."""
        for group in groups:
            if not self._closed:
                self._start(group)

    def _start(self, group: Group) -> None:
        self._reading.add(group)
        if group.before is not None:
            task = self._loop.create_task(self._prepare(group))
            group.started.append(task)
            return
        self._read(group)

    async def _prepare(self, group: Group) -> None:
        assert group.before is not None
        try:
            await group.before()
        except Exception as error:
            group.started.clear()
            self._failed(group, error)
        else:
            group.started.clear()
            self._read(group)

    def _read(self, group: Group) -> None:
        group.left, group.bodies = len(group.reads), [None] * len(group.reads)
        try:
            for number, (key, start, stop, token) in enumerate(group.reads):
                done = partial(self._answered, group, number)
                group.started.append(self._store_of(key).start(key, start, stop, token, done))
        except Exception as error:  # nobody else would hear of it: the loop called us
            return self._failed(group, error)
        if not group.reads:
            self._complete(group)
        return None

    def _answered(
        self, group: Group, number: int, body: bytes | None, error: Exception | None
    ) -> None:
        group.left -= 1
        absent = isinstance(error, ObjectNotFoundError) and group.reads[number][2] is None
        if error is not None and not absent:
            return self._failed(group, error)
        group.bodies[number] = None if absent else body or b""
        if not group.left:
            self._complete(group)
        return None

    def _failed(self, group: Group, error: Exception) -> None:
        group.error, group.left = error, 0
        for read in group.started:  # the rest of it is of no use
            read.cancel()
        self._complete(group)

    def _complete(self, group: Group) -> None:
        self._reading.discard(group)
        group.started.clear()
        group.looked = True
        self._hand_over(group)

    def _hand_over(self, group: Group) -> None:
        """To a decode thread: to look for it, or because it is there."""
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
            if self._look is not None:
                groups = self._looking(self._look, groups)
            if not groups:
                continue
            self._take(groups)
            size = sum(group.size_bytes for group in groups)
            groups.clear()  # its bodies are free before others take their room
            self._loop.call_soon_threadsafe(self._decoded, size)

    def _looking(self, look: Callable[[Group], None], groups: list[Group]) -> list[Group]:
        """Those of which all is there; what others still lack is asked for."""
        fresh = [group for group in groups if not group.looked]
        for group in fresh:
            look(group)
        lacking = [group for group in fresh if group.reads or group.before is not None]
        if lacking:
            self._loop.call_soon_threadsafe(self._looked_for, lacking)
        return [group for group in groups if group not in lacking]
