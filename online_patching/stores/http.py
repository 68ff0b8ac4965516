"""http(s):// by range requests, with aiohttp."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp

from online_patching.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    RangeIgnoredError,
    ShortReadError,
    StoreError,
    redact,
)
from online_patching.stores.retry import RetryPolicy, TransientError, with_retries

T = TypeVar("T")

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_OBJECT_BYTES = 256 * 2**20
"""The largest tile, chunk or metadata document that is read whole."""


class HttpStore:
    """Byte ranges of objects behind http(s), keyed by URL. Make it inside the loop that uses it.

    A 200 answer to a Range request is aborted before its body: it would be the whole slide. A
    changed ETag raises ObjectChangedError. Credentials and queries never appear in messages.
    """

    def __init__(self, policy: RetryPolicy | None = None, connections: int = 64) -> None:
        self.policy = policy or RetryPolicy()
        self.retries = 0
        self._slots = asyncio.Semaphore(connections)
        self._session: aiohttp.ClientSession | None = None

    async def version(self, key: str) -> tuple[int, str]:
        """Size in bytes and the ETag (or Last-Modified): from a one-byte range request."""

        async def once() -> tuple[int, str]:
            async with self._get(key, {"Range": "bytes=0-0"}) as answer:
                _check_range_answer(key, answer, 0, 1)
                size = _content_range(key, answer)[2]
                token = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
                return size, token

        return await self._retry(key, once)

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of an object, or all of it when stop is None.

        `token` is the ETag seen when the slide was indexed; another one raises.
        """
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        if token.startswith('"'):  # weak ETags (W/...) may not be used with If-Match
            headers["If-Match"] = token

        async def once() -> bytes:
            async with self._get(key, headers) as answer:
                _check_token(key, answer, token)
                if stop is None:
                    return await _whole_body(key, answer)
                _check_range_answer(key, answer, start, stop)
                body = await _body(key, answer, stop - start)
                if len(body) != stop - start:
                    raise TransientError(
                        f"{len(body):,} bytes where {stop - start:,} were promised"
                    )
                return body

        return await self._retry(key, once)

    async def close(self) -> None:
        """Close the session and its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _retry(self, key: str, once: Callable[[], Awaitable[T]]) -> T:
        async def guarded() -> T:
            try:
                async with self._slots:  # a try's clock starts when it has a connection to itself
                    return await once()
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                raise TransientError(type(error).__name__) from None
            except TimeoutError:
                raise TransientError(f"no answer within {self.policy.timeout_s:g} s") from None
            except aiohttp.ClientError as error:
                raise StoreError(redact(key), f"{type(error).__name__}.") from None

        return await with_retries(self.policy, redact(key), guarded, self._count_retry)

    def _count_retry(self) -> None:
        self.retries += 1

    def _get(self, key: str, headers: dict[str, str]) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=self.policy.timeout_s, sock_connect=self.policy.connect_timeout_s
                ),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._session.get(key, headers=headers, max_redirects=5)


def _check_range_answer(key: str, answer: aiohttp.ClientResponse, start: int, stop: int) -> None:
    name = redact(key)
    status = answer.status
    if status == 206:
        first, last, size = _content_range(key, answer)
        if first == start and last == stop - 1:
            return
        if first == start and last == size - 1 < stop - 1:
            raise ShortReadError(name, start, stop, size)
        raise RangeIgnoredError(name, f"asked for bytes {start}-{stop - 1}, got {first}-{last}.")
    if status == 200:
        answer.close()
        raise RangeIgnoredError(
            name,
            "the server ignores byte ranges (200 to a Range request); reading patches would download "
            "the whole slide each time. Use a server that answers 206, or copy the slide.",
        )
    if status == 416:
        raise ShortReadError(name, start, stop, max(0, _content_range(key, answer)[2]))
    _raise_for_status(name, status)


def _raise_for_status(name: str, status: int) -> None:
    if status in (404, 410):
        raise ObjectNotFoundError(name, f"HTTP {status}: there is no such object. Check the URL.")
    if status in (401, 403):
        raise StoreError(name, f"HTTP {status}: access refused. Check the credentials.")
    if status == 412:
        raise ObjectChangedError(name, "changed since it was indexed (HTTP 412). Index it again.")
    if status in _RETRIED:
        raise TransientError(f"HTTP {status}")
    if status != 200:
        raise StoreError(name, f"HTTP {status}, which is no answer to this request.")


def _content_range(key: str, answer: aiohttp.ClientResponse) -> tuple[int, int, int]:
    """First and last byte and the object's size; -1 for what a 416 or an error does not say."""
    match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", answer.headers.get("Content-Range", ""))
    if match:
        first, last, size = (int(part) if part else -1 for part in match.groups())
        return first, last, size
    if answer.status == 206:
        value = answer.headers.get("Content-Range", "")
        raise RangeIgnoredError(
            redact(key), f"the server's Content-Range {value[:60]!r} is not one."
        )
    return -1, -1, -1


def _check_token(key: str, answer: aiohttp.ClientResponse, token: str) -> None:
    now = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
    if token and now and answer.status in (200, 206) and now != token:
        answer.close()
        raise ObjectChangedError(
            redact(key), "changed since it was indexed (ETag). Index it again."
        )


async def _whole_body(key: str, answer: aiohttp.ClientResponse) -> bytes:
    _raise_for_status(redact(key), answer.status)
    return await _body(key, answer, MAX_OBJECT_BYTES)


async def _body(key: str, answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """At most `limit` bytes: a server that sends more is cut off, not buffered."""
    body = bytearray()
    async for piece in answer.content.iter_chunked(1 << 18):
        body += piece
        if len(body) > limit:
            answer.close()
            raise RangeIgnoredError(redact(key), f"sent more than the {limit:,} bytes asked for.")
    return bytes(body)
