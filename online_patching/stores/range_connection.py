"""One keep-alive connection that carries one range request at a time.

Until the head has ended the socket is read into a buffer that all connections of a client share
(a loop reads one socket at a time): a tile's whole answer mostly arrives in one go. What is left
of the body is read straight into its place, which is exactly as large as the range that was asked
for: nothing that a server sends makes anything grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from online_patching.errors import ObjectNotFoundError, PatchingError
from online_patching.stores.http_answer import (
    MAX_HEAD_BYTES,
    Head,
    UnusualAnswerError,
    check_range,
    check_token,
    parse_head,
    whole_size,
)
from online_patching.stores.http_target import Origin
from online_patching.stores.retry import TransientError

Done = Callable[[bytes | None, Exception | None], None]
"""Called once on the loop with the body, or with what went wrong."""


class Get:
    """One range wanted: bytes `start`..`stop` of `key`, by the bytes of its `request`.

    `stop` is None for all of an object until its answer says how long that is.
    """

    __slots__ = (
        "connection",
        "done",
        "key",
        "origin",
        "request",
        "reused",
        "start",
        "stop",
        "token",
    )

    def __init__(
        self,
        key: str,
        origin: Origin,
        request: bytes,
        start: int,
        stop: int | None,
        token: str,
        done: Done,
    ) -> None:
        self.key, self.origin, self.request = key, origin, request
        self.start, self.stop, self.token, self.done = start, stop, token, done
        self.connection: Connection | None = None
        self.reused = False  # whether a stale connection has swallowed it already


READ_BYTES = 256 * 2**10
"""As large as the shared buffer is: what Linux hands over at once from a socket on one machine."""


class Owner(Protocol):
    """What a connection asks and tells its pool."""

    buffer: memoryview

    def free(self, connection: Connection) -> None:
        """It can carry the next request."""

    def lost(self, connection: Connection) -> None:
        """It is gone."""

    def again(self, get: Get) -> None:
        """A request that a stale connection swallowed: send it on another."""


class Connection(asyncio.BufferedProtocol):
    """Sends `Get`s one after another and calls each one's `done`."""

    def __init__(self, owner: Owner, origin: Origin) -> None:
        self.owner, self.origin = owner, origin
        self.get: Get | None = None
        self.sent_at = self.deadline = 0.0
        self.answers = 0
        self._transport: asyncio.Transport | None = None
        self._head = b""  # the part of one that came in pieces
        self._keep = True
        self._body: memoryview | None = None
        self._got = 0

    def send(self, get: Get, now: float, deadline: float) -> None:
        """Ask for a range; the connection must be free and usable."""
        assert self.get is None and self._transport is not None
        self.get, get.connection = get, self
        self.sent_at, self.deadline = now, deadline
        self._transport.write(get.request)

    @property
    def usable(self) -> bool:
        """Whether another request can be sent on it."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def _begun(self) -> bool:
        """Whether any byte of an answer has come."""
        return bool(self._head) or self._body is not None

    @property
    def answering(self) -> bool:
        """Whether the head of the answer is there."""
        return self._body is not None

    def abort(self) -> None:
        """Drop the connection at once, with whatever is on it."""
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: Exception) -> None:
        """Give up the request on the way, and the connection with it."""
        get, self.get = self.get, None
        self.abort()
        if get is not None:
            get.connection = None
            get.done(None, error)

    # --- what asyncio calls -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: never past the shared buffer or the body's end."""
        if self._body is None:
            return self.owner.buffer
        return self._body[self._got :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take in `nbytes` that were written into the buffer."""
        get = self.get
        if get is None:  # nobody asked: whatever it is, it must not answer the next request
            self.abort()
        elif self._body is not None:
            self._got += nbytes
            if self._got == len(self._body):
                self._finish(get, bytes(self._body))
        else:
            self._take_head(get, self.owner.buffer[:nbytes])

    def eof_received(self) -> None:
        """Close: an answer cannot be whole any more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Say so, and let the request be sent again where the connection had gone stale."""
        self.owner.lost(self)
        get, self.get = self.get, None
        if get is None:
            return
        get.connection = None
        if self.answers and not self._begun and not get.reused:
            get.reused = True
            self.owner.again(get)
            return
        what = type(exc).__name__ if exc else "the connection ended"
        got = f" after {self._got:,} of {len(self._body):,} bytes" if self._body is not None else ""
        get.done(None, TransientError(what + got))

    # --- answers ------------------------------------------------------------------------------

    def _take_head(self, get: Get, data: memoryview) -> None:
        if self._head:
            data = memoryview(self._head + data)
        start = bytes(data[: MAX_HEAD_BYTES + 4])
        end = start.find(b"\r\n\r\n")
        if end < 0:
            self._head = start
            if len(data) > MAX_HEAD_BYTES:
                self.fail(UnusualAnswerError(f"a head of more than {MAX_HEAD_BYTES:,} bytes"))
            return
        try:
            head = parse_head(start[:end])
            check_token(get.key, head, get.token)
            if get.stop is None:
                wanted = whole_size(get.key, head)
            else:
                check_range(get.key, head, get.start, get.stop)
                wanted = get.stop - get.start
        except ObjectNotFoundError as error:
            if head.keep and head.length == len(data) - end - 4:
                self._finish(
                    get, None, error
                )  # absent chunks are common in Zarr: no new connection
            else:
                self.fail(error)
        except (PatchingError, TransientError, UnusualAnswerError) as error:
            self.fail(error)  # with the connection: its body is not wanted
        else:
            self._begin_body(get, head, data[end + 4 :], wanted)

    def _begin_body(self, get: Get, head: Head, data: memoryview, wanted: int) -> None:
        have = len(data)
        self._keep = head.keep and have <= wanted  # more than the body is nobody's answer
        if have >= wanted:
            return self._finish(get, bytes(data[:wanted]))
        self._head = b""
        self._body, self._got = memoryview(bytearray(wanted)), have
        self._body[:have] = data
        return None

    def _finish(self, get: Get, body: bytes | None, error: Exception | None = None) -> None:
        self.get = get.connection = self._body = None
        self._head, self._got = b"", 0
        self.answers += 1
        if self._keep:
            self.owner.free(self)  # first: the next request is on its way while this one is used
        else:
            self.abort()
        get.done(body, error)
