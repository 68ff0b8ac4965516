"""http(s) with a complete client, aiohttp: redirects, credentials in URLs, proxies, chunked bodies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from online_patching.errors import StoreError, redact
from online_patching.stores.address import Address
from online_patching.stores.http_answer import (
    MAX_OBJECT_BYTES,
    Head,
    check_encoding,
    check_range,
    check_size,
    check_token,
    content_range,
    raise_for_status,
    sent_more,
)
from online_patching.stores.http_headers import headers_for
from online_patching.stores.http_target import if_match, parse_url, proxy_for
from online_patching.stores.redirects import MOST_REDIRECTS, REDIRECTS, redirect_target
from online_patching.stores.retry import RetryPolicy, TransientError


class FullClient:
    """One try of a read each: TransientError is worth another, everything else is final.

    At most `slots` requests at once; a try's clock starts when it has a slot. Redirects are followed
    where stores/redirects.py lets them.
    """

    def __init__(self, policy: RetryPolicy, slots: int = 64) -> None:
        self.policy = policy
        self._slots = asyncio.Semaphore(slots)
        self._session: aiohttp.ClientSession | None = None

    async def version(self, key: str, address: Address) -> tuple[int, str]:
        """Size in bytes and the ETag (or Last-Modified): from a one-byte range request."""
        async with self._get(key, address, {"Range": "bytes=0-0"}) as answer:
            head = Head.of(answer.status, answer.headers)
            empty = head.status == 416 or (head.status == 206 and answer.content_length == 0)
            if not empty:
                _checked(answer, check_range, key, head, 0, 1)
                return content_range(key, head)[2], head.token
        async with self._get(key, address, {}) as answer:  # it has no first byte: ask for all of it
            raise_for_status(key, Head.of(answer.status, answer.headers))
            size_bytes = answer.content_length
            answer.close()
            return size_bytes or 0, Head.of(answer.status, answer.headers).token

    async def read(
        self, key: str, start: int, stop: int | None, token: str, address: Address
    ) -> bytes:
        """Bytes start..stop of an object, or to its end when stop is None."""
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if stop is None and not start:
            del headers["Range"]
        if if_match(token):
            headers["If-Match"] = token
        async with self._get(key, address, headers) as answer:
            head = Head.of(answer.status, answer.headers)
            _checked(answer, check_token, key, head, token)
            if stop is None and not start:
                _checked(answer, raise_for_status, key, head)
                _checked(answer, check_encoding, key, head)
                return await _body(key, answer, MAX_OBJECT_BYTES)
            if stop is None:
                stop = max(content_range(key, head)[2], start + 1)
                _checked(answer, check_size, key, stop - start, MAX_OBJECT_BYTES)
            _checked(answer, check_range, key, head, start, stop)
            body = await _body(key, answer, stop - start)
            if len(body) != stop - start:
                raise TransientError(f"{len(body):,} bytes where {stop - start:,} were promised")
            return body

    async def header(self, key: str, url: str, name: str) -> str:
        """One header of the answer, whatever it is, to a HEAD request; '' when it is not there."""
        async with self._told(key):
            there = parse_url(url, encoded=True)
            proxy = proxy_for(there.scheme, there.host or "")
            asked = self._client().head(there, allow_redirects=False, proxy=proxy)
            async with self._soon(), asked as answer:
                return answer.headers.get(name, "")

    async def close(self) -> None:
        """Close the session and its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @asynccontextmanager
    async def _get(
        self, key: str, address: Address, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._told(key):
            async with self._soon():
                answer = await self._follow(key, address, headers | dict(address.headers))
            async with answer:
                yield answer

    @asynccontextmanager
    async def _soon(self) -> AsyncIterator[None]:
        """A block that ends within the time for connecting and for a first byte."""
        limit_s = self.policy.connect_timeout_s + self.policy.first_byte_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise TransientError(f"no answer within {limit_s:g} s") from None

    @asynccontextmanager
    async def _told(self, key: str) -> AsyncIterator[None]:
        """One of the slots and the time for a whole try, with aiohttp's errors told as ours."""
        try:
            async with self._slots, asyncio.timeout(self.policy.timeout_s):
                yield
        except aiohttp.ClientConnectorCertificateError:
            raise StoreError(redact(key), "certificate not trusted.") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise TransientError(type(error).__name__) from None
        except TimeoutError:
            raise TransientError(f"not finished within {self.policy.timeout_s:g} s") from None
        except (aiohttp.ClientError, UnicodeError) as error:  # the latter of a host that is no name
            raise StoreError(redact(key), f"{type(error).__name__}.") from None

    async def _follow(
        self, key: str, address: Address, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        """The first answer that is no redirect."""
        first = url = parse_url(address.url, encoded=address.signed)
        for _ in range(MOST_REDIRECTS + 1):
            proxy = proxy_for(url.scheme, url.host or "")
            answer = await self._client().get(
                url, headers=headers | dict(headers_for(url)), allow_redirects=False, proxy=proxy
            )
            location = answer.headers.get("Location")
            if answer.status not in REDIRECTS or location is None:
                return answer
            answer.release()
            if address.signed:  # what is signed is meant for one host
                raise StoreError(redact(key), f"is redirected (HTTP {answer.status}).")
            url = await redirect_target(key, first, url, location)
        raise StoreError(redact(key), f"is redirected more than {MOST_REDIRECTS} times.")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self.policy.connect_timeout_s
                ),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._session


def _checked(answer: aiohttp.ClientResponse, check: Callable[..., None], *args: Any) -> None:
    """Run a check; drop the connection at once when it fails, before a body arrives."""
    try:
        check(*args)
    except Exception:
        answer.close()
        raise


async def _body(key: str, answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """At most `limit` bytes: a server that sends more is cut off, not buffered."""
    body = bytearray()
    async for piece in answer.content.iter_chunked(1 << 18):
        body += piece
        if len(body) > limit:
            answer.close()
            raise sent_more(key, limit)
    return bytes(body)
