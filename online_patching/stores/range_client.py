"""Byte ranges over http(s) for a third of a full client's CPU: keep-alive HTTP/1.1 GETs, no more.

No task is made for a request: a request is an object that waits in its origin's queue, travels on
a connection, and calls back. Everything out of the ordinary (redirects, proxies, credentials in the
URL, chunked bodies) is left to aiohttp: `target_of` or an UnusualAnswerError says so.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from online_patching.errors import StoreError
from online_patching.stores.http_target import Origin, Target, request_of
from online_patching.stores.range_connection import READ_BYTES, Connection, Done, Get
from online_patching.stores.retry import RetryPolicy, TransientError

DEFAULT_CONNECTIONS = 512
"""Enough for 5,000 requests/s at 100 ms each."""

_MOST_CONNECTING = 64
_ADDRESSES_KEPT_S = 30.0
_TURN = (
    16  # answers that a connection has given before it may have to make room for another origin's
)


@dataclass(eq=False)
class _Pool:
    """One origin's connections: free ones, how many there are and are being made, and who waits."""

    idle: list[Connection] = field(default_factory=list)
    waiting: OrderedDict[Get, None] = field(default_factory=OrderedDict)  # oldest first
    live: int = 0
    connecting: int = 0
    last_turn: int = 0  # when it last got to make one, counted
    addresses: list[tuple[str, int]] = field(default_factory=list)
    refusing: set[tuple[str, int]] = field(default_factory=set)
    resolved_at: float = -1e9
    resolving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def held(self) -> int:
        """Connections that it has or is making."""
        return self.live + self.connecting

    @property
    def wants(self) -> bool:
        """Whether another connection would be made for it, had it room."""
        return len(self.waiting) > self.connecting < _MOST_CONNECTING

    def next(self) -> Get:
        """Take the oldest waiting request."""
        return self.waiting.popitem(last=False)[0]


class RangeClient:
    """Range GETs over at most `connections` connections in all. Use it on one event loop only.

    Requests are sent in the order of asking, those of one origin; origins that wait share the
    connections equally. The clock of a try starts when its request is sent.
    `stale` counts the requests sent again because a kept connection turned out to be closed.
    """

    def __init__(self, policy: RetryPolicy, connections: int = DEFAULT_CONNECTIONS) -> None:
        self.policy, self.connections = policy, min(connections, _half_of_open_files())
        self.stale = 0
        self.buffer = memoryview(bytearray(READ_BYTES))
        self._connecting = self._turns = 0
        self._loop = asyncio.get_running_loop()
        self._pools: dict[Origin, _Pool] = {}
        self._live: set[Connection] = set()
        self._leaving: set[Connection] = set()  # aborted and not counted any more
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        shortest = min(policy.timeout_s, policy.first_byte_timeout_s)
        self._sweep_s = min(max(shortest / 8, 0.01), 0.5)
        self._first_byte_s = shortest

    def start(
        self, target: Target, key: str, start: int, stop: int | None, token: str, done: Done
    ) -> Get:
        """Ask for bytes start..stop (at least one, or with None all of the object).

        `done` is called once, unless it is cancelled.
        """
        get = Get(
            key, target.origin, request_of(target, start, stop, token), start, stop, token, done
        )
        pool = self._pools.get(target.origin)
        if pool is None:
            pool = self._pools[target.origin] = _Pool()
        while pool.idle and not pool.waiting:
            connection = pool.idle.pop()
            if connection.usable:
                self._send(connection, get)
                return get
        pool.waiting[get] = None
        self._grow(target.origin, pool)
        return get

    def cancel(self, get: Get) -> None:
        """Forget a request; what is on its way is cut off with its connection."""
        if get.connection is not None:
            get.connection.get = None
            get.connection.abort()
        else:
            self._pools[get.origin].waiting.pop(get, None)

    async def close(self) -> None:
        """Drop every connection. Requests under way are forgotten: cancel or fail them before."""
        self._pools.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._live:
            connection.get = None
            connection.abort()
        while self._live or self._leaving:  # noqa: ASYNC110 - a socket is closed a turn of the loop after its abort
            await asyncio.sleep(0)
        if self._sweeper is not None:
            self._sweeper.cancel()

    # --- what connections tell -----------------------------------------------------------------

    def free(self, connection: Connection) -> None:
        """Send the oldest waiting request of its origin, keep it for the next, or make room."""
        pool = self._pools.get(connection.origin)
        if pool is None or not connection.usable:
            connection.abort()
        elif pool.waiting:
            if connection.answers >= _TURN and len(self._pools) > 1 and self._is_owed(pool):
                self._leaving.add(connection)
                self.lost(connection)  # now, not when it has closed: others may be freed meanwhile
                connection.abort()
            else:
                self._send(connection, pool.next())
        else:
            pool.idle.append(connection)
            if len(self._pools) > 1:
                self._grow_others()

    def lost(self, connection: Connection) -> None:
        """Make room for another."""
        if connection not in self._live:  # it broke before it was ours, or went to make room
            self._leaving.discard(connection)
            return
        self._live.discard(connection)
        pool = self._pools.get(connection.origin)
        if pool is None:
            return
        pool.live -= 1
        if connection in pool.idle:
            pool.idle.remove(connection)
        self._grow_others()

    def again(self, get: Get) -> None:
        """Send a request that met a stale connection before all others."""
        self.stale += 1
        pool = self._pools[get.origin]
        pool.waiting[get] = None
        pool.waiting.move_to_end(get, last=False)
        self._grow(get.origin, pool)

    # --- connections ---------------------------------------------------------------------------

    def _send(self, connection: Connection, get: Get) -> None:
        now = self._loop.time()
        connection.send(get, now, now + self._first_byte_s)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._sweep_s, self._sweep)

    def _is_owed(self, pool: _Pool) -> bool:
        """Whether one of this origin's connections should go to another that waits with fewer.

        Fewer by two at least, or none: the last one would go to and fro.
        """
        if len(self._live) + self._connecting < self.connections:
            return False
        return any(
            other.wants and (not other.held or other.held + 1 < pool.held)
            for other in self._pools.values()
            if other is not pool
        )

    def _grow_others(self) -> None:
        waiting = [item for item in self._pools.items() if item[1].waiting]
        for origin, pool in sorted(waiting, key=lambda item: (item[1].held, item[1].last_turn)):
            self._grow(origin, pool)

    def _grow(self, origin: Origin, pool: _Pool) -> None:
        """Begin as many connections as requests wait for, within the limits."""
        while pool.wants and self._has_room():
            pool.connecting += 1
            self._connecting += 1
            self._turns += 1
            pool.last_turn = self._turns
            task = self._loop.create_task(self._connect(origin, pool))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _has_room(self) -> bool:
        if len(self._live) + self._connecting < self.connections:
            return True
        for pool in self._pools.values():  # another origin's idle connection may make room
            if pool.idle and not pool.waiting:
                pool.idle.pop(0).abort()  # `lost` comes back here
                break
        return False

    async def _connect(self, origin: Origin, pool: _Pool) -> None:
        problem: Exception
        try:
            async with asyncio.timeout(self.policy.connect_timeout_s):
                connection = await self._open(origin, pool)
        except TimeoutError:
            problem = TransientError(f"no connection within {self.policy.connect_timeout_s:g} s")
        except ssl.SSLCertVerificationError as error:
            problem = StoreError(
                f"{origin[0]}://{origin[1]}", f"certificate not trusted: {error.verify_message}."
            )
        except OSError as error:
            problem = TransientError(f"cannot connect ({type(error).__name__})")
        except Exception as error:  # of a host that is no name; whoever waits must hear of anything
            problem = StoreError(
                f"{origin[0]}://{origin[1]}",
                f"cannot be connected to ({type(error).__name__}). Check the URL.",
            )
        else:
            pool.live += 1
            self._live.add(connection)
            return self.free(connection)
        finally:
            pool.connecting -= 1
            self._connecting -= 1
        # A host that does not answer at all fails everybody: 64 at a time would take for ever.
        failed = len(pool.waiting) if pool.live == 0 else min(1, len(pool.waiting))
        for get in [pool.next() for _ in range(failed)]:
            get.done(None, problem)
        self._grow_others()
        return None

    async def _open(self, origin: Origin, pool: _Pool) -> Connection:
        """A connection to the first address that answers."""
        scheme, host, _ = origin
        more: dict[str, Any] = {}
        if scheme == "https":
            if self._tls is None:
                self._tls = ssl.create_default_context()
            more = {"ssl": self._tls, "server_hostname": host}
        last: OSError | None = None
        addresses = await self._resolve(origin, pool)
        for address in addresses:
            try:
                async with asyncio.timeout(self.policy.connect_timeout_s / len(addresses)):
                    _, connection = await self._loop.create_connection(
                        lambda: Connection(self, origin), *address, **more
                    )
            except OSError as error:  # a TimeoutError is one
                pool.refusing.add(address)
                last = error
            else:
                pool.refusing.discard(address)
                return connection
        raise last or OSError("no address")

    async def _resolve(self, origin: Origin, pool: _Pool) -> Sequence[tuple[str, int]]:
        """The host's addresses, kept for a while: hundreds of connections ask at once."""
        async with pool.resolving:
            if self._loop.time() - pool.resolved_at > _ADDRESSES_KEPT_S:
                found = await self._loop.getaddrinfo(*origin[1:], type=socket.SOCK_STREAM)
                pool.addresses = [(str(item[4][0]), int(item[4][1])) for item in found]
                pool.resolved_at = self._loop.time()
            # Those that refused or never answered (IPv6 without a route) come last.
            return sorted(pool.addresses, key=pool.refusing.__contains__)

    def _sweep(self) -> None:
        """Fail what is overdue: one timer for all requests costs less than one each."""
        now, busy = self._loop.time(), False
        for connection in list(self._live):
            if connection.get is None:
                continue
            busy = True
            if now < connection.deadline:
                continue
            whole = connection.sent_at + self.policy.timeout_s
            if connection.answering and now < whole:
                connection.deadline = whole
            elif connection.answering:
                connection.fail(TransientError(f"not finished within {self.policy.timeout_s:g} s"))
            else:
                connection.fail(TransientError(f"no answer within {self._first_byte_s:g} s"))
        self._sweeper = self._loop.call_later(self._sweep_s, self._sweep) if busy else None


def _half_of_open_files() -> int:
    """Half the descriptors this process may open: slides and sockets of others need some too."""
    try:
        import resource
    except ImportError:  # Windows counts otherwise
        return DEFAULT_CONNECTIONS
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return DEFAULT_CONNECTIONS if soft < 0 else max(1, soft // 2)
