"""Stores that must be awaited, as ones that start reads and call back: what the feed asks of a store."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Protocol

from online_patching.stores.range_connection import Done


class Started(Protocol):
    """A read on its way."""

    def cancel(self) -> object:
        """Let go of it; nobody is called back."""
        ...


class Starter(Protocol):
    """What the feed asks of a store."""

    def start(self, key: str, start: int, stop: int | None, token: str, done: Done) -> Started:
        """Begin to read bytes start..stop (all of them where stop is None) and return at once.

        `done(body, None)` or `done(None, error)` is called on this loop, later and once, unless the
        read is cancelled. Call it on the loop's thread.
        """
        ...


class Reader(Protocol):
    """The half of an AsyncStore that is needed here."""

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of the version `token` of an object."""
        ...


class Awaited:
    """A Starter that makes a task of each read, for filesystems that only know how to be awaited."""

    def __init__(self, store: Reader) -> None:
        self._store = store

    def start(
        self, key: str, start: int, stop: int | None, token: str, done: Done
    ) -> asyncio.Task[bytes]:
        """See Starter."""
        loop = asyncio.get_running_loop()
        task: asyncio.Task[bytes] = loop.create_task(self._read(key, start, stop, token))
        task.add_done_callback(partial(_ended, done))
        return task

    async def _read(self, key: str, start: int, stop: int | None, token: str) -> bytes:
        return await self._store.read(key, start, stop, token)


def _ended(done: Done, task: asyncio.Task[bytes]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        done(task.result(), None)
    else:
        done(None, error if isinstance(error, Exception) else RuntimeError(repr(error)))
