"""http(s):// by range requests: a small client for plain ones, aiohttp for everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from online_patching.errors import StoreError, redact
from online_patching.stores.address import Address
from online_patching.stores.cloud import place_of
from online_patching.stores.cloud_addresses import CloudAddresses
from online_patching.stores.cloud_listing import Query, list_place
from online_patching.stores.http_answer import RefusedError, UnusualAnswerError
from online_patching.stores.http_full import FullClient
from online_patching.stores.http_target import Origin, Target
from online_patching.stores.listing import MOST_LISTED, Listed, cannot_list, in_order
from online_patching.stores.range_client import DEFAULT_CONNECTIONS, RangeClient
from online_patching.stores.range_connection import Done, Get
from online_patching.stores.retry import RetryPolicy, TransientError, with_retries

T = TypeVar("T")


class HttpStore:
    """Byte ranges of objects behind http(s), keyed by URL. Make it inside the loop that uses it.

    A 200 answer to a Range request is aborted before its body: it would be the whole slide. A
    changed ETag raises ObjectChangedError. Credentials and queries never appear in messages.

    Ranges and whole objects go through a RangeClient. Versions, URLs with credentials, proxies from
    the environment and hosts that once answered in an unusual way (a redirect, a chunked body) go
    through aiohttp, at three times the CPU a request (docs/decisions/0010-range-client.md).
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        connections: int = DEFAULT_CONNECTIONS,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.connections = connections
        self.retries = 0
        self.full = FullClient(self.policy)
        self.addresses = CloudAddresses(self.full.header)
        self.active: set[RangeRead] = set()
        self._stale = 0
        self._ranges: RangeClient | None = None
        self._unusual: set[Origin] = set()

    @property
    def stale(self) -> int:
        """Requests sent again, not counted as retries, because a kept connection had been closed."""
        return self._stale + (self._ranges.stale if self._ranges else 0)

    async def version(self, key: str) -> tuple[int, str]:
        """Size in bytes and the ETag (or Last-Modified): from a one-byte range request."""
        return await self.asked(key, lambda address: self.full.version(key, address))

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of an object, or to its end when stop is None.

        `token` is the ETag seen when the slide was indexed; another one raises.
        """
        if stop is not None or not start:
            return (await self.read_many([(key, start, stop, token)]))[0]
        return await self.asked(
            key, lambda address: self.full.read(key, start, None, token, address)
        )

    async def read_many(self, ranges: Sequence[tuple[str, int, int | None, str]]) -> list[bytes]:
        """Bytes of several (key, start, stop, token), asked for at once and in this order.

        The first error is raised and ends the rest. One future serves all: a task each would cost
        as much as the requests.
        """
        found: list[bytes] = [b""] * len(ranges)
        left = len(ranges)
        ended = asyncio.get_running_loop().create_future()

        def done_for(number: int) -> Done:
            def done(body: bytes | None, error: Exception | None) -> None:
                nonlocal left
                left -= 1
                if body is not None:
                    found[number] = body
                if ended.done():
                    return
                if error is not None:
                    ended.set_exception(error)
                elif left == 0:
                    ended.set_result(None)

            return done

        reads = [self.start(*wanted, done_for(i)) for i, wanted in enumerate(ranges)]
        try:
            if reads:
                await ended
        finally:
            if left:
                for read in reads:
                    read.cancel()
        return found

    def start(self, key: str, start: int, stop: int | None, token: str, done: Done) -> RangeRead:
        """Begin to read bytes start..stop, or the whole object from 0 to None, without awaiting it.

        `done(body, None)` or `done(None, error)` is called on this loop, later and once, unless the
        read is cancelled. Call it on the loop's thread.
        """
        return RangeRead(self, key, start, stop, token, done)

    async def list(self, prefix: str, most: int = MOST_LISTED) -> list[Listed]:
        """Every object below a cloud's prefix, by URI. StoreError for http(s), which has no listing."""
        place = place_of(prefix)
        if place is None:
            raise cannot_list(prefix)

        async def ask(query: Query) -> bytes:
            return await self.asked(prefix, partial(self._page, prefix, query))

        found = await list_place(prefix, place, most, ask)
        if not found and place.name:
            size_bytes, token = await self.version(prefix)
            found = [Listed(prefix, size_bytes, token)]
        return in_order(prefix, found)

    async def _page(self, prefix: str, query: Query, _: Address) -> bytes:
        grant = await self.addresses.grant_for(prefix)
        assert grant is not None
        return await self.full.read(prefix, 0, None, "", grant.address("", query))

    async def close(self) -> None:
        """Close every connection; reads under way end with an error."""
        for read in list(self.active):
            read.cut_off()
        ranges, self._ranges = self._ranges, None
        if ranges is not None:
            self._stale += ranges.stale
            await ranges.close()
        await self.full.close()

    async def asked(self, key: str, once: Callable[[Address], Awaitable[T]]) -> T:
        """What `once` gets from the key's address, with retries and one renewal of credentials."""
        renewed = False

        async def attempt() -> T:
            nonlocal renewed
            address = self.addresses.at_once(key) or await self.addresses.soon(key)
            try:
                return await once(address)
            except RefusedError as error:
                if renewed or not self.addresses.refused(key, address):
                    raise self.told(key, error) from None
            renewed = True
            return await attempt()

        return await with_retries(self.policy, redact(key), attempt, self.count_retry)

    def told(self, key: str, error: RefusedError) -> RefusedError:
        """A refusal with what may mend it."""
        return RefusedError(key, error.reason + self.addresses.hint(key), error.code)

    def plain(self, address: Address) -> Target | None:
        """Where an address's ranges are asked for, if the small client may do it."""
        target = address.target
        return None if target is None or target.origin in self._unusual else target

    def client(self) -> RangeClient:
        """The small client, made when first used."""
        if self._ranges is None:
            self._ranges = RangeClient(self.policy, self.connections)
        return self._ranges

    def leave_to_aiohttp(self, address: Address) -> None:
        """This host answers in a way that needs a complete client: ask it with one from now on."""
        if address.target is not None:
            self._unusual.add(address.target.origin)

    def count_retry(self) -> None:
        """One more try."""
        self.retries += 1


class RangeRead:
    """One range on its way, through all its tries; made by `HttpStore.start`."""

    __slots__ = ("_address", "_done", "_failed", "_renewed", "_step", "_store", "_wanted")

    def __init__(
        self, store: HttpStore, key: str, start: int, stop: int | None, token: str, done: Done
    ) -> None:
        self._store, self._wanted = store, (key, start, stop, token)
        self._done: Done | None = done
        self._failed, self._renewed = 0, False
        self._address: Address | None = None
        self._step: Get | asyncio.Handle | asyncio.Task[None] | None = None
        if stop is None or start < stop:
            self._try()  # raises in the asker when the key is no URL
        else:
            self._step = asyncio.get_running_loop().call_soon(self._end, b"", None)
        store.active.add(self)

    def cancel(self) -> None:
        """Let go of it: `done` is not called any more."""
        if self._done is not None:
            self._done = None
            self._store.active.discard(self)
            self._drop_step()

    def cut_off(self) -> None:
        """End it with an error, because its store is closed."""
        if self._done is not None:
            self._drop_step()
            key = redact(self._wanted[0])
            self._end(None, StoreError(key, "was being read when its store was closed."))

    def _drop_step(self) -> None:
        if isinstance(self._step, Get):
            self._store.client().cancel(self._step)
        elif self._step is not None:
            self._step.cancel()

    def _try(self) -> None:
        self._address = address = self._store.addresses.at_once(self._wanted[0])
        if address is None:
            self._step = asyncio.get_running_loop().create_task(self._make_ready())
            return
        target = self._store.plain(address)
        if target is not None:
            self._step = self._store.client().start(target, *self._wanted, self._answered)
        else:
            self._step = asyncio.get_running_loop().create_task(self._ask_aiohttp(address))

    async def _make_ready(self) -> None:
        try:
            await self._store.addresses.soon(self._wanted[0])
        except Exception as error:
            self._answered(None, error)
        else:
            self._try()

    async def _ask_aiohttp(self, address: Address) -> None:
        try:
            body = await self._store.full.read(*self._wanted, address)
        except Exception as error:
            self._answered(None, error)
        else:
            self._answered(body, None)

    def _answered(self, body: bytes | None, error: Exception | None) -> None:
        policy, key = self._store.policy, self._wanted[0]
        if self._done is None:
            return
        address = self._address
        if isinstance(error, UnusualAnswerError) and address is not None:
            self._store.leave_to_aiohttp(address)
            self._try()
        elif isinstance(error, RefusedError) and self._may_renew():
            self._renewed = True
            self._try()
        elif isinstance(error, RefusedError):
            self._end(None, self._store.told(key, error))
        elif not isinstance(error, TransientError):
            self._end(body, error)
        elif self._failed + 1 >= policy.attempts:
            self._end(None, policy.given_up(redact(key), error))
        else:
            self._failed += 1
            self._store.count_retry()
            loop = asyncio.get_running_loop()
            self._step = loop.call_later(policy.delay_s(self._failed, error.after_s), self._try)

    def _may_renew(self) -> bool:
        """Whether new credentials may be accepted where these were not; once a read."""
        if self._renewed or self._address is None:
            return False
        return self._store.addresses.refused(self._wanted[0], self._address)

    def _end(self, body: bytes | None, error: Exception | None) -> None:
        done, self._done = self._done, None
        self._store.active.discard(self)
        if done is not None:
            done(body, error)
