"""Where bytes come from: local files, http(s), S3, GCS and Azure, and any filesystem fsspec knows.

Two kinds of store: LocalStore answers at once and is called inside decode threads; the others are
awaited on an event loop and are made inside the process that uses them (clients do not survive a
fork). `Stores` holds one of each for a process and lets plain code read from both.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from online_patching.errors import PatchingError, redact
from online_patching.stores.any_fsspec import FsspecStore
from online_patching.stores.awaited import Awaited, Starter
from online_patching.stores.cloud import CLOUDS
from online_patching.stores.http import HttpStore
from online_patching.stores.listing import MOST_LISTED, Listed, list_folder
from online_patching.stores.local import LocalStore, atomic_write_bytes, atomic_write_text
from online_patching.stores.range_client import DEFAULT_CONNECTIONS
from online_patching.stores.retry import RetryPolicy

__all__ = [
    "AsyncStore",
    "FsspecStore",
    "HttpStore",
    "Listed",
    "LocalStore",
    "LoopThread",
    "RetryPolicy",
    "Stores",
    "atomic_write_bytes",
    "atomic_write_text",
    "is_ranged",
    "is_remote",
    "local_path",
    "redact",
]

Request = tuple[str, int, int | None, str]
"""A range wanted: URI, first byte, the one past the last (None: to the end), version token ('' : any)."""

Answers = list[bytes | PatchingError]
"""For each range its bytes, or what went wrong with it."""

Versions = list[tuple[int, str] | PatchingError]
"""For each object its size and token, or what went wrong with it."""

_MOST_AT_ONCE = 512  # as many as HttpStore has connections
_RANGED = frozenset({"http", "https", *CLOUDS})


class AsyncStore(Protocol):
    """What a remote store offers: the version of an object, and ranges of its bytes."""

    retries: int

    async def version(self, key: str) -> tuple[int, str]:
        """Size in bytes and a token that changes with the content ('' when there is none)."""
        ...

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Exactly the bytes start..stop (to the end when stop is None) of that version, or an error."""
        ...

    async def list(self, prefix: str, most: int = MOST_LISTED) -> list[Listed]:
        """Every object below a prefix, sorted by URI; StoreError past `most` of them."""
        ...

    async def close(self) -> None:
        """Let go of every connection."""
        ...


def is_remote(uri: str) -> bool:
    """Whether a URI needs the event loop (has a scheme other than file)."""
    return "://" in uri and not uri.startswith("file://")


def is_ranged(uri: str) -> bool:
    """Whether a URI is read by range requests of our own: http(s), s3, gs, az and their other names."""
    return uri.partition("://")[0].lower() in _RANGED


def local_path(uri: str) -> str:
    """The absolute path of a local URI."""
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


class LoopThread:
    """An event loop in a daemon thread, for code that is not async itself."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pid = os.getpid()
        self._thread = threading.Thread(target=self.loop.run_forever, name="patch-io", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine on the loop; returns a concurrent future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the loop and wait for its result."""
        return self.submit(work).result()

    def call(self, work: Callable[[], None]) -> None:
        """Call a plain function on the loop and wait until it is done."""

        async def once() -> None:
            work()

        self.run(once())

    def cancel_all(self) -> None:
        """Cancel every coroutine that still runs, and wait for their ends."""
        self.submit(_cancel_others()).result(timeout=10)

    def close(self) -> None:
        """Cancel what still runs, stop the loop and join its thread."""
        if self.loop.is_closed() or self.pid != os.getpid():
            return
        self.cancel_all()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()


class Stores:
    """The stores of one process: one LocalStore, one client for HTTP and clouds, one for fsspec, one loop.

    `connections` bounds what http(s) and the clouds hold at once, all hosts together. Everything is made
    on first use, so an instance may be created (or used) before a fork, or pickled without its clients.
    """

    def __init__(
        self, policy: RetryPolicy | None = None, connections: int = DEFAULT_CONNECTIONS
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.connections = connections
        self.local = LocalStore()
        self._remote: dict[str, AsyncStore] = {}
        self._awaited: Starter | None = None
        self._loop: LoopThread | None = None
        self._lock = threading.Lock()

    @property
    def loop(self) -> LoopThread:
        """This process's event-loop thread."""
        with self._lock:
            self._forget_parents()
            if self._loop is None:
                self._loop = LoopThread()
            return self._loop

    def _forget_parents(self) -> None:
        """After a fork: the loop's thread is not here, and its sockets are another process's."""
        if self._loop is not None and self._loop.pid != os.getpid():
            self._remote, self._awaited, self._loop = {}, None, None

    def cancel_all(self) -> None:
        """Cancel every remote read that is under way."""
        if self._loop is not None and self._loop.pid == os.getpid():
            self._loop.cancel_all()

    @property
    def retries(self) -> int:
        """Retries of all remote stores together."""
        return sum(store.retries for store in self._remote.values())

    def remote(self, uri: str) -> AsyncStore:
        """The client for a remote URI: one for http(s) and all clouds, one for fsspec's other schemes."""
        kind = "http" if is_ranged(uri) else "fsspec"
        with self._lock:
            self._forget_parents()
            if kind not in self._remote:
                self._remote[kind] = (
                    HttpStore(self.policy, self.connections)
                    if kind == "http"
                    else FsspecStore(self.policy)
                )
            return self._remote[kind]

    def http(self) -> HttpStore:
        """The client for http(s) and the clouds: it also starts ranges without awaiting them."""
        store = self.remote("http://")
        assert isinstance(store, HttpStore)
        return store

    def starter(self, uri: str) -> Starter:
        """The client for a remote URI as one that starts reads without awaiting them; call it on the loop."""
        store = self.remote(uri)
        if isinstance(store, HttpStore):
            return store
        if self._awaited is None:
            self._awaited = Awaited(store)
        return self._awaited

    def version(self, uri: str) -> tuple[int, str]:
        """Size and version token of an object, waiting for the answer."""
        if is_remote(uri):
            size, token = self.loop.run(self.remote(uri).version(uri))
            return size, token
        return self.local.version(local_path(uri))

    def read(self, uri: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of the version `token` ('' : any) of an object, to its end when stop is None."""
        if is_remote(uri):
            data: bytes = self.loop.run(self.remote(uri).read(uri, start, stop, token))
            return data
        return self.local.read(local_path(uri), start, stop, token)

    def list(self, prefix: str, most: int = MOST_LISTED) -> list[Listed]:
        """Every object below a folder or prefix (or the object itself), sorted by URI.

        ObjectNotFoundError when there is nothing, StoreError past `most` objects and for http(s).
        """
        if is_remote(prefix):
            found: list[Listed] = self.loop.run(self.remote(prefix).list(prefix, most))
            return found
        return list_folder(local_path(prefix), most)

    def read_many(self, requests: Sequence[Request]) -> Answers:
        """The bytes of each (uri, start, stop, token), or what went wrong with it, in the same order.

        Remote ones are read at the same time. `stop` None means to the end.
        """
        remote = [i for i, request in enumerate(requests) if is_remote(request[0])]
        answers = (
            self.loop.submit(self._read_remote([requests[i] for i in remote])) if remote else None
        )
        found: dict[int, bytes | PatchingError] = {}
        for i in sorted(set(range(len(requests))) - set(remote)):
            try:
                found[i] = self.read(*requests[i])
            except PatchingError as error:
                found[i] = error
        if answers is not None:
            found |= zip(remote, answers.result(), strict=True)
        return [found[i] for i in range(len(requests))]

    async def _read_remote(self, requests: Sequence[Request]) -> Answers:
        turn = asyncio.Semaphore(_MOST_AT_ONCE)

        async def one(request: Request) -> bytes | PatchingError:
            async with turn:
                try:
                    return await self.remote(request[0]).read(*request)
                except PatchingError as error:
                    return error

        return await asyncio.gather(*map(one, requests))

    def version_many(self, uris: Sequence[str]) -> Versions:
        """Size and token of each object, or what went wrong with it; remote ones are asked at the same time."""

        def local(uri: str) -> tuple[int, str] | PatchingError:
            try:
                return self.version(uri)
            except PatchingError as error:
                return error

        async def away() -> Versions:
            turn = asyncio.Semaphore(_MOST_AT_ONCE)

            async def one(uri: str) -> tuple[int, str] | PatchingError:
                async with turn:
                    try:
                        return await self.remote(uri).version(uri)
                    except PatchingError as error:
                        return error

            return await asyncio.gather(*(one(uri) for uri in uris if is_remote(uri)))

        remote = iter(self.loop.run(away()) if any(map(is_remote, uris)) else ())
        return [next(remote) if is_remote(uri) else local(uri) for uri in uris]

    def close(self) -> None:
        """Close clients, descriptors and the loop thread."""
        self.local.close()
        if self._loop is not None and self._loop.pid == os.getpid():
            for store in self._remote.values():
                self._loop.run(store.close())
            self._loop.close()
        self._remote.clear()
        self._awaited = self._loop = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Stores, (self.policy, self.connections))


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
