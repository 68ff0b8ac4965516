"""The small HTTP client: any split of any answer, connections kept, dropped and closed, what it leaves to aiohttp."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from email.parser import BytesParser
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_patching import errors
from online_patching.stores import HttpStore, RetryPolicy, range_client, redirects
from online_patching.stores.http_answer import MAX_HEAD_BYTES, UnusualAnswerError, parse_head
from online_patching.stores.http_target import proxy_for, request_of, target_of
from online_patching.stores.range_client import RangeClient
from online_patching.stores.range_connection import READ_BYTES, Connection, Get
from online_patching.stores.retry import TransientError

QUICK = RetryPolicy(attempts=3, first_delay_s=0.01, timeout_s=1.0, connect_timeout_s=1.0)
START, STOP, TOKEN = 1000, 1300, '"abc"'
BODY = bytes(i * 7 % 251 for i in range(STOP - START))


def answer(*more: str, status: str = "206 Partial Content", body: bytes = BODY) -> bytes:
    """A good answer to bytes START..STOP; `more` header lines replace those of the same name."""
    lines = {
        "content-length": f"Content-Length: {len(BODY)}",
        "content-range": f"Content-Range: bytes {START}-{STOP - 1}/99999",
        "etag": f"ETag: {TOKEN}",
    }
    lines |= {line.partition(":")[0].lower(): line for line in more}
    return "\r\n".join([f"HTTP/1.1 {status}", *lines.values(), "", ""]).encode("latin-1") + body


# --- one connection, fed by hand -------------------------------------------------------------------


class Transport:
    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Pool:
    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.freed: list[Connection] = []
        self.again_asked: list[Get] = []

    def free(self, connection: Connection) -> None:
        self.freed.append(connection)

    def lost(self, connection: Connection) -> None: ...

    def again(self, get: Get) -> None:
        self.again_asked.append(get)


def feed(
    data: bytes, cuts: list[int], start=START, stop=STOP
) -> tuple[list[tuple[bytes | None, Exception | None]], bool]:
    """What one request is told when `data` arrives in pieces and then the end; and whether the connection
    would be used again."""
    told: list[tuple[bytes | None, Exception | None]] = []
    pool = Pool()
    connection = Connection(pool, ("http", "h", 80))
    transport = Transport()
    connection.connection_made(transport)
    connection.send(
        Get(
            "http://h/a", ("http", "h", 80), b"", start, stop, TOKEN, lambda *got: told.append(got)
        ),
        0.0,
        1.0,
    )
    for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
        piece = data[a:b]
        while piece and not transport.closed:
            room = connection.get_buffer(-1)
            assert 0 < len(room) <= READ_BYTES
            taken = min(len(room), len(piece))
            room[:taken] = piece[:taken]
            connection.buffer_updated(taken)
            piece = piece[taken:]
    kept = bool(pool.freed) and not transport.closed
    connection.connection_lost(None)
    assert not pool.again_asked  # it was the connection's first request
    return told, kept


WHOLE = f"HTTP/1.1 200 OK\r\nETag: {TOKEN}\r\n".encode()


@pytest.mark.parametrize("size", [0, 1, 5000, 300_000])
def test_a_whole_object_is_as_long_as_its_answer_says(size: int) -> None:
    body = bytes(range(250)) * (size // 250 + 1)
    data = WHOLE + f"Content-Length: {size}\r\n\r\n".encode() + body[:size]
    for cuts in ([], [10], [len(WHOLE) + 3, len(data) - 1] if size else [7]):
        assert feed(data, cuts, 0, None) == ([(body[:size], None)], True)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (WHOLE + b"\r\n", UnusualAnswerError, "no Content-Length"),
        (WHOLE + b"Content-Length: 999999999999\r\n\r\n", errors.StoreError, "at most 268,435,456"),
        (WHOLE + b"Content-Length: 9\r\n\r\n1234", TransientError, "after 4 of 9 bytes"),
        (
            WHOLE + b"Content-Length: 9\r\nContent-Encoding: gzip\r\n\r\n",
            errors.StoreError,
            "encoded",
        ),
        (b'HTTP/1.1 200 OK\r\nETag: "b"\r\n\r\n', errors.ObjectChangedError, "changed"),
        (answer(), errors.StoreError, "HTTP 206"),
    ],
)
def test_an_answer_that_is_not_the_whole_object_is_one_clear_error(
    data: bytes, error: type[Exception], words: str
) -> None:
    told, kept = feed(data, [], 0, None)
    assert len(told) == 1
    assert isinstance(told[0][1], error)
    assert words in str(told[0][1])
    assert not kept


@st.composite
def split(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> tuple[bytes, list[int]]:
    whole = draw(data)
    return whole, sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))


@given(split(st.just(answer()) | st.just(answer("Server: x", "Connection: keep-alive"))))
def test_a_good_answer_in_any_pieces_is_its_body(data: tuple[bytes, list[int]]) -> None:
    told, kept = feed(*data)
    assert told == [(BODY, None)]
    assert kept


@given(split(st.integers(0, len(answer()) - 1).map(lambda n: answer()[:n])))
def test_a_cut_answer_in_any_pieces_is_worth_another_try(data: tuple[bytes, list[int]]) -> None:
    told, kept = feed(*data)
    assert len(told) == 1
    assert isinstance(told[0][1], TransientError)
    assert not kept


def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(answer())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - len(BODY)))
        piece = draw(
            st.binary(max_size=6) | st.sampled_from([b"\r\n", b"\n", b":", b"\0", b" ", b"9"])
        )
        data[at : at + draw(st.integers(0, 4))] = piece
    return bytes(data)


@given(split(st.composite(damaged)() | st.binary(max_size=400)))
def test_whatever_arrives_is_the_range_or_an_error(data: tuple[bytes, list[int]]) -> None:
    """A body is believed only where an independent parser finds the very same in its head."""
    told, _ = feed(*data)
    assert len(told) == 1
    body, error = told[0]
    assert (body is None) != (error is None)
    if body is None:
        assert isinstance(error, errors.PatchingError | TransientError | UnusualAnswerError)
        return
    head, _, rest = data[0].partition(b"\r\n\r\n")
    status, _, fields = head.partition(b"\r\n")
    message = BytesParser().parsebytes(fields + b"\r\n\r\n", headersonly=True)
    assert status.startswith(b"HTTP/1.1 206")
    assert message.get_all("Content-Length") == [str(len(BODY))]
    assert re.fullmatch(rf"bytes {START}-{STOP - 1}/\d+", str(message["Content-Range"]).strip())
    assert body == rest[: len(BODY)]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (answer(status="302 Found"), UnusualAnswerError, "HTTP 302"),
        (answer(status="103 Early Hints"), UnusualAnswerError, "HTTP 103"),
        (answer("Transfer-Encoding: chunked"), UnusualAnswerError, "transfer encoding"),
        (answer().replace(b"HTTP/1.1", b"HTTP/1.0"), UnusualAnswerError, "HTTP/1.0"),
        (answer().replace(b"ETag", b"Content-Length: 300\r\nETag"), UnusualAnswerError, "twice"),
        (answer("X: y\r\n folded"), UnusualAnswerError, "head that begins"),
        (answer("Content-Length: 0x12c"), UnusualAnswerError, "Content-Length"),
        (answer("Content-Length: +300"), UnusualAnswerError, "Content-Length"),
        (answer("Content-Length: ²"), UnusualAnswerError, "Content-Length"),
        (answer("Content-Length:"), UnusualAnswerError, "no Content-Length"),
        (answer("X: " + "y" * MAX_HEAD_BYTES), UnusualAnswerError, "more than 16,384"),
        (answer("Content-Length: 301"), errors.RangeIgnoredError, "more than the 300"),
        (answer("Content-Length: 299"), TransientError, "299 bytes where 300"),
        (answer("Content-Range: bytes 1001-1300/99999"), errors.RangeIgnoredError, "got 1001"),
        (answer("Content-Range: bytes 1000-1299/*"), errors.RangeIgnoredError, "is not one"),
        (answer("Content-Range: bytes 1000-1199/1200"), errors.ShortReadError, "1,200 bytes"),
        (answer("Content-Range:"), errors.RangeIgnoredError, "is not one"),
        (answer('ETag: "other"'), errors.ObjectChangedError, "changed"),
        (answer("ETag:"), errors.ObjectChangedError, "answered without"),
        (answer("Content-Encoding: gzip"), errors.StoreError, "Content-Encoding 'gzip'"),
        (answer(status="200 OK"), errors.RangeIgnoredError, "ignores byte ranges"),
        (answer(status="204 No Content"), errors.StoreError, "HTTP 204"),
        (answer(status="404 Not Found"), errors.ObjectNotFoundError, "HTTP 404"),
        (answer(status="401 Unauthorized"), errors.StoreError, "access refused"),
        (answer(status="412 Precondition Failed"), errors.ObjectChangedError, "HTTP 412"),
        (answer("Content-Range: bytes */900", status="416 x"), errors.ShortReadError, "900 bytes"),
        (answer(status="429 Too Many Requests"), TransientError, "HTTP 429"),
        (answer("Transfer-Encoding: chunked", status="503 x"), TransientError, "HTTP 503"),
        (
            answer(status="502 x").replace(b"HTTP/1.1", b"HTTP/1.0"),
            TransientError,
            "HTTP 502",
        ),
        (answer("Content-Length: x", status="404 x"), errors.ObjectNotFoundError, "HTTP 404"),
    ],
)
def test_each_answer_that_is_not_the_range_is_one_clear_error(
    data: bytes, error: type[Exception], words: str
) -> None:
    told, kept = feed(data, [])
    assert len(told) == 1
    assert isinstance(told[0][1], error)
    assert words in str(told[0][1])
    assert kept is (
        data == answer(status="404 Not Found")
    )  # whole: absent chunks of a Zarr are common


@pytest.mark.parametrize("encoding", ["identity", "Identity", "", "aws-chunked"])
def test_an_encoding_that_is_none_is_none(encoding: str) -> None:
    assert feed(answer(f"Content-Encoding: {encoding}"), [])[0] == [(BODY, None)]


@pytest.mark.parametrize("data", [answer("Connection: close"), answer(body=BODY + b"more")])
def test_a_connection_that_says_more_or_ends_is_not_used_again(data: bytes) -> None:
    told, kept = feed(data, [])
    assert told == [(BODY, None)]
    assert not kept


def test_a_head_keeps_what_is_asked_of_it() -> None:
    head = parse_head(
        b"HTTP/1.1 206 \r\nlast-modified: Mon\r\nCONTENT-RANGE:\tbytes 1-2/3 \r\ncontent-length:2"
    )
    assert (head.status, head.content_range, head.token, head.length) == (
        206,
        "bytes 1-2/3",
        "Mon",
        2,
    )


# --- a real server on the same loop --------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve, **more: object):
    """A server on this machine; yields its address and leaves no connection behind."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0, **more)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.sleep(0.01)  # what was accepted has its task by then
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # and is closed


def always(data: bytes, requests: list[bytes] | None = None, wait_s: float = 0.0) -> Serve:
    """Answers every request with `data`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked = await reader.readuntil(b"\r\n\r\n")
            if requests is not None:
                requests.append(asked)
            await asyncio.sleep(wait_s)
            writer.write(data)

    return serve


def sockets() -> int:
    """Open sockets of this process."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return sum(name.startswith("socket:") for name in names)


def run(work: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def read(store: HttpStore, address: str, token: str = "", scheme: str = "http") -> bytes:
    return await store.read(f"{scheme}://{address}/a", START, STOP, token)


def test_requests_say_what_they_must_and_connections_are_kept() -> None:
    async def work() -> None:
        requests: list[bytes] = []
        opened = 0
        inner = always(answer(), requests)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal opened
            opened += 1
            await inner(reader, writer)

        async with serving(serve) as address:
            store = HttpStore(QUICK)
            for _ in range(5):
                assert await store.read(f"http://{address}/ä b?sig=x#f", START, STOP, TOKEN) == BODY
            with pytest.raises(errors.ObjectChangedError):  # compared, though not sent
                await read(store, address, 'W/"weak"')
            await store.close()
        assert opened == 1
        lines = requests[0].decode().split("\r\n")
        assert lines[0] == "GET /%C3%A4%20b?sig=x HTTP/1.1"
        assert f"Host: {address}" in lines
        assert "Accept-Encoding: identity" in lines
        assert f"Range: bytes={START}-{STOP - 1}" in lines
        assert f"If-Match: {TOKEN}" in lines
        assert b"If-Match" not in requests[-1]

    run(work())


def test_a_token_cannot_smuggle_a_header_in() -> None:
    target = target_of("http://h/a")
    assert target is not None
    for token in ('"a\r\nX: y"', '"a"\r\n', '"ä"', "plain", '"a" , "b"'):
        assert b"If-Match" not in request_of(target, 0, 1, token)


def test_many_requests_share_few_connections_in_order() -> None:
    async def work() -> None:
        requests: list[bytes] = []
        async with serving(always(answer(), requests, wait_s=0.005)) as address:
            before = sockets()
            client = RangeClient(QUICK, connections=4)
            done: list[int] = []
            for i in range(40):
                target = target_of(f"http://{address}/{i}")
                client.start(target, "k", START, STOP, "", lambda *_, i=i: done.append(i))
            most = 0
            while len(done) < 40:
                most = max(most, sockets() - before)
                await asyncio.sleep(0.002)
            assert most <= 8  # both ends are ours
            order = [int(re.match(rb"GET /(\d+)", asked)[1]) for asked in requests]
            assert max(abs(i - k) for i, k in enumerate(order)) <= 4
            await client.close()

    run(work())


def test_a_stale_connection_costs_no_retry() -> None:
    async def work() -> None:
        async def once_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer())
            await reader.readuntil(b"\r\n\r\n")  # the second request finds it closed

        async with serving(once_each) as address:
            store = HttpStore(QUICK)
            for _ in range(4):
                assert await read(store, address) == BODY
            assert store.stale > 0
            assert store.retries == 0
            await store.close()

    run(work())


def test_a_server_that_never_answers_a_second_request_is_given_up() -> None:
    async def work() -> None:
        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")

        async with serving(never) as address:
            store = HttpStore(QUICK)
            with pytest.raises(errors.StoreUnavailableError, match="failed 3 times"):
                await read(store, address)
            assert store.retries == 2
            await store.close()

    run(work())


def test_cancelled_reads_and_closed_stores_leave_no_socket() -> None:
    async def work() -> None:
        before = sockets()
        async with serving(always(answer(), wait_s=30)) as address:
            store = HttpStore(QUICK, connections=3)
            tasks = [asyncio.create_task(read(store, address)) for _ in range(10)]
            await asyncio.sleep(0.1)
            for task in tasks[:5]:
                task.cancel()
            told = []
            store.start(f"http://{address}/a", START, STOP, "", lambda *got: told.append(got))
            await asyncio.sleep(0.1)
            await store.close()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(e) for e in ended[:5]] == [asyncio.CancelledError] * 5
            assert [type(e) for e in ended[5:]] == [errors.StoreError] * 5
            assert [type(error) for _, error in told] == [errors.StoreError]
            assert not store.active
        await asyncio.sleep(0.05)
        assert sockets() == before

    run(work())


def test_one_origins_idle_connections_make_room_for_another() -> None:
    async def work() -> None:
        async with serving(always(answer())) as a, serving(always(answer())) as b:
            store = HttpStore(QUICK, connections=2)
            for address in (a, b, a, b):
                found = await asyncio.gather(*(read(store, address) for _ in range(4)))
                assert found == [BODY] * 4
            assert store.retries == 0
            await store.close()

    run(work())


@pytest.mark.parametrize("unusual", ["redirect", "chunked"])
def test_what_is_unusual_is_read_by_aiohttp_and_remembered(unusual: str) -> None:
    async def work() -> None:
        requests: list[bytes] = []
        redirect = b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n"
        chunked = answer("Content-Length: ", "Transfer-Encoding: chunked", body=b"").replace(
            b"Content-Length: \r\n", b""
        ) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                requests.append(await reader.readuntil(b"\r\n\r\n"))
                if unusual == "chunked":
                    writer.write(chunked)
                else:
                    writer.write(redirect if b"GET /a" in requests[-1] else answer())

        async with serving(serve) as address:
            store = HttpStore(QUICK)
            for _ in range(3):
                assert await read(store, address, TOKEN) == BODY
            assert store.retries == 0
            await store.close()
        assert sum(b"online_patching" in asked for asked in requests) == 1
        assert sum(b"aiohttp" in asked for asked in requests) == (3 if unusual == "chunked" else 6)

    run(work())


def test_a_server_that_says_slow_down_in_chunks_is_retried_and_keeps_the_small_client() -> None:
    async def work() -> None:
        requests: list[bytes] = []
        slow_down = (
            b"HTTP/1.1 503 Slow Down\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        )

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(slow_down if len(requests) == 1 else answer())

        async with serving(serve) as address:
            store = HttpStore(QUICK)
            for _ in range(3):
                assert await read(store, address) == BODY
            assert store.retries == 1
            await store.close()
        assert [b"online_patching" in asked for asked in requests] == [True] * 4

    run(work())


def test_whole_objects_are_not_taken_encoded_either() -> None:
    async def work() -> None:
        data = answer("Content-Encoding: gzip", status="200 OK")
        async with serving(always(data)) as address:
            store = HttpStore(QUICK)
            with pytest.raises(errors.StoreError, match="Content-Encoding 'gzip'"):
                await store.read(f"http://{address}/a", 0, None)
            await store.close()

    run(work())


def test_cancelling_asks_nothing_of_those_who_still_wait() -> None:
    """Cancelled ones are never sent, the rest in order. Nobody is compared with: that took n^2 steps."""
    compared = 0

    class Counted(Get):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return self is other

        __hash__ = object.__hash__

    async def work() -> None:
        requests: list[bytes] = []
        async with serving(always(answer(), requests)) as address:
            client = RangeClient(QUICK, connections=1)
            done: list[int] = []
            gets = [
                client.start(
                    target_of(f"http://{address}/{i}"),
                    "k",
                    START,
                    STOP,
                    "",
                    lambda *_, i=i: done.append(i),
                )
                for i in range(200)
            ]
            kept = set(range(0, 200, 20))
            for i in reversed(range(200)):
                if i not in kept:
                    client.cancel(gets[i])
            while len(done) < len(kept):
                await asyncio.sleep(0.002)
            await client.close()
            assert done == sorted(kept)
            assert len(requests) == len(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_client, "Get", Counted)
        run(work())
    assert compared == 0


@pytest.mark.parametrize("connections", [1, 2, 3])
def test_an_origin_that_never_stops_asking_does_not_keep_all_connections(connections: int) -> None:
    """While others are asked for without end, each still gets its answers."""

    async def work() -> None:
        async with (
            serving(always(answer())) as a,
            serving(always(answer())) as b,
            serving(always(answer())) as c,
        ):
            client = RangeClient(QUICK, connections)
            told: Counter[str] = Counter()

            def ask(address: str) -> None:
                def done(body: bytes | None, error: Exception | None) -> None:
                    assert body == BODY
                    told[address] += 1
                    ask(address)

                target = target_of(f"http://{address}/a")
                client.start(target, "k", START, STOP, "", done)

            for address in (a, b, c):
                for _ in range(10):
                    ask(address)
                while told[address] < 10:
                    await asyncio.sleep(0.002)
            assert len(client._live) <= connections
            await client.close()

    run(work())


def test_origins_that_both_wait_come_to_share_the_connections_and_keep_them() -> None:
    async def work() -> None:
        opened: Counter[str] = Counter()
        inner = always(answer(), wait_s=0.001)

        def counted(name: str) -> Serve:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                opened[name] += 1
                await inner(reader, writer)

            return serve

        async with serving(counted("a")) as a, serving(counted("b")) as b:
            client = RangeClient(QUICK, connections=5)
            left = {a: 300, b: 300}

            def start(address: str) -> None:
                def done(*_: object) -> None:
                    left[address] -= 1

                client.start(target_of(f"http://{address}/a"), "k", START, STOP, "", done)

            for address in (a, b):
                for _ in range(300):
                    start(address)
            while left[a] > 100 and left[b] > 100:
                await asyncio.sleep(0.001)
            assert sorted(pool.held for pool in client._pools.values()) == [2, 3]
            assert opened["a"] + opened["b"] <= 8  # none goes to and fro
            while any(left.values()):
                await asyncio.sleep(0.001)
            await client.close()

    run(work())


def test_redirects_do_not_lead_into_a_private_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are this machine's own when connected to, and public or not when looked at."""
    named = {"public.example": "93.184.216.34", "inside.example": "10.1.2.3"}
    named["elsewhere.example"] = "2606:4700::1111"

    def resolve(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        address = "127.0.0.1" if host in named else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def look(host: str, port: int) -> list[str]:
        return [named[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(redirects, "addresses_of", look)

    async def work() -> None:
        asked: list[bytes] = []
        async with serving(always(answer(), asked)) as there:
            port = there.rpartition(":")[2]

            async def follow(first: str, target: str) -> bytes:
                away = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
                async with serving(always(away.encode())) as here:
                    store = HttpStore(QUICK)
                    try:
                        return await read(store, f"{first}:{here.rpartition(':')[2]}")
                    finally:
                        await store.close()

            for inside in ("127.0.0.1", "inside.example", "169.254.169.254", "[::1]", "10.0.0.1"):
                with pytest.raises(errors.StoreError, match="private network"):
                    await follow("public.example", f"http://{inside}:{port}/latest/meta-data")
            with pytest.raises(errors.StoreError, match=r"not http\(s\)"):
                await follow("public.example", "file:///etc/passwd")
            assert not asked
            assert await follow("public.example", f"http://elsewhere.example:{port}/a") == BODY
            assert await follow("inside.example", f"http://127.0.0.1:{port}/a") == BODY
            assert len(asked) == 2

    run(work())


def test_redirects_without_end_are_one_error() -> None:
    async def work() -> None:
        away = b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n"
        asked: list[bytes] = []
        async with serving(always(away, asked)) as address:
            store = HttpStore(QUICK)
            with pytest.raises(errors.StoreError, match="redirected more than 5 times"):
                await store.version(f"http://{address}/a")
            await store.close()
        assert len(asked) == 6

    run(work())


def test_credentials_stay_with_their_origin() -> None:
    """Kept where the redirect leads to the same origin, and not elsewhere (the next test)."""

    async def work() -> None:
        asked: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                asked.append(await reader.readuntil(b"\r\n\r\n"))
                host = re.search(rb"Host: (\S+)", asked[-1])[1]
                away = (
                    b"HTTP/1.1 307 x\r\nLocation: http://%s/b\r\nContent-Length: 0\r\n\r\n" % host
                )
                writer.write(away if b"GET /a" in asked[-1] else answer())

        async with serving(serve) as address:
            store = HttpStore(QUICK)
            assert await read(store, f"user:se%40cret@{address}") == BODY
            await store.close()
        assert [b"Authorization: Basic dXNlcjpzZUBjcmV0" in one for one in asked] == [True, True]

    run(work())


def test_credentials_go_through_aiohttp_and_not_to_another_host() -> None:
    async def work() -> None:
        here: list[bytes] = []
        there: list[bytes] = []
        async with serving(always(answer(), there)) as other:
            away = f"HTTP/1.1 302 Found\r\nLocation: http://{other}/b\r\nContent-Length: 0\r\n\r\n"
            async with serving(always(away.encode(), here)) as address:
                store = HttpStore(QUICK)
                assert await read(store, f"user:secret@{address}") == BODY
                await store.close()
        assert b"Authorization: Basic" in here[0]
        assert b"Authorization" not in there[0]

    assert target_of("http://user:secret@h/a") is None
    run(work())


def test_proxies_of_the_environment_are_left_to_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget() -> None:
        target_of.cache_clear()
        proxy_for.cache_clear()

    async def work() -> None:
        asked: list[bytes] = []
        async with serving(always(answer(), asked)) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy}")
            monkeypatch.setenv("no_proxy", "inside.example")
            forget()
            assert target_of("http://slides.example/a") is None
            assert target_of("http://inside.example/a") is not None
            assert target_of("http://127.0.0.1/a") is not None
            store = HttpStore(QUICK)
            assert await read(store, "slides.example") == BODY
            await store.close()
        assert asked[0].startswith(b"GET http://slides.example/a HTTP/1.1")

    try:
        run(work())
    finally:
        monkeypatch.undo()
        forget()


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    """A server's context, whose certificate is tmp_path / "c"."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not at hand to make a certificate")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -keyout k -out c".split()
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names], check=True, capture_output=True, cwd=tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    return context


def test_no_redirect_from_https_to_http(
    tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        asked: list[bytes] = []
        async with serving(always(answer(), asked)) as plain:
            away = f"HTTP/1.1 302 Found\r\nLocation: http://{plain}/b\r\nContent-Length: 0\r\n\r\n"
            async with serving(always(away.encode()), ssl=tls) as address:
                store = HttpStore(QUICK)
                with pytest.raises(errors.StoreError, match="from https to http"):
                    await read(store, address, scheme="https")
                await store.close()
        assert not asked

    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c"))
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", ssl.create_default_context())
    run(work())


def test_https_is_verified(
    tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with serving(always(answer()), ssl=tls) as address:
            store = HttpStore(QUICK)
            with pytest.raises(errors.StoreError, match="certificate not trusted"):
                await read(store, address, scheme="https")
            with pytest.raises(errors.StoreError, match="certificate not trusted"):
                await store.version(f"https://{address}/a")
            assert store.retries == 0
            await store.close()
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c"))
            store = HttpStore(QUICK)
            found = await asyncio.gather(*(read(store, address, scheme="https") for _ in range(20)))
            assert found == [BODY] * 20
            await store.close()

    run(work())
