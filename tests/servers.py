"""A real HTTP server in a thread, with ranges and ETags, that can be told to misbehave."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

FLOOD_BYTES = 2**26


@dataclass
class Faults:
    """What goes wrong at every `every`-th request, until `count` is used up (-1: for ever).

    Kinds: a status ("500", "403", ...); "ignore-range" (200 and all of a very large object); "wrong-range";
    "flood" (more bytes than asked); "truncate" (half the body, then the end); "reset" and "reset-mid" (RST,
    before or within the answer); "drip" (a byte at a time, for ever); "hang" (no answer).
    Counted by kind in `FaultServer.seen`.
    """

    kind: str = ""
    count: int = -1
    only_data: bool = False  # leave the one-byte version probe alone
    every: int = 1


@dataclass
class FaultServer:
    """Serves the files under `root`. `seen` counts requests, faults and statuses, `ranges` what was asked."""

    root: Path
    faults: Faults = field(default_factory=Faults)
    etag: str = '"one"'  # '' : of each file's bytes
    delay_s: float = 0.0
    heeds_if_match: bool = True
    seen: Counter[str] = field(default_factory=Counter)
    refuses: str = ""  # 403 to every URL that holds this
    more: dict[str, str] = field(default_factory=dict)  # headers of answers that are a status

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.ranges: list[tuple[str, int, int]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.sent_bytes = 0
        self.concurrent = self.most_concurrent = 0
        self.closing = threading.Event()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self.http = _Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def fault(self, start: int, stop: int) -> str:
        with self.lock:
            if not self.faults.kind or self.faults.count == 0:
                return ""
            if self.faults.only_data and stop - start <= 1:
                return ""
            self.seen["data"] += 1
            if self.seen["data"] % self.faults.every:
                return ""
            self.faults.count -= 1
            self.seen[self.faults.kind] += 1
            return self.faults.kind


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512  # of 5, hundreds of connections at once would wait for a second SYN

    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet: clients that cut a connection off are what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FaultServer
    etag = '"none"'

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        state = self.server_state
        with state.lock:
            state.seen["requests"] += 1
            state.headers.append(dict(self.headers))
            state.paths.append(self.path)
            state.concurrent += 1
            state.most_concurrent = max(state.most_concurrent, state.concurrent)
        try:
            self._answer(state)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with state.lock:
                state.concurrent -= 1

    def _answer(self, state: FaultServer) -> None:
        time.sleep(state.delay_s)
        path = state.root / unquote(self.path.partition("?")[0]).lstrip("/")
        if not path.is_file():
            return self._send(404, b"")
        data = path.read_bytes()
        self.etag = state.etag or f'"{zlib.crc32(data):08x}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self._send(200, data)
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        if state.heeds_if_match and self.headers.get("If-Match", self.etag) != self.etag:
            return self._send(412, b"")
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        with state.lock:
            state.ranges.append((self.path, start, stop))
        kind = state.fault(start, stop)
        if state.refuses and state.refuses in self.path:
            return self._send(403, b"")
        if kind.isdigit():
            return self._send(int(kind), b"no", state.more)
        if kind == "ignore-range":
            return self._send(200, data + bytes(FLOOD_BYTES))
        if kind == "hang":
            state.closing.wait(10)
        if kind == "reset":
            return self._reset()
        shift = 1 if kind == "wrong-range" else 0
        head = {"Content-Range": f"bytes {start + shift}-{stop - 1 + shift}/{len(data)}"}
        body = data[start:stop] + (bytes(2**21) if kind == "flood" else b"")
        return self._send(206, body, head, kind)

    def _send(
        self, status: int, body: bytes, more: dict[str, str] | None = None, kind: str = ""
    ) -> None:
        state = self.server_state
        with state.lock:
            state.seen[f"HTTP {status}"] += 1
        self.send_response(status)
        for name, value in {"ETag": self.etag, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind in ("truncate", "reset-mid"):
            self._write(body[: len(body) // 2])
            self.close_connection = True
            if kind == "reset-mid":
                time.sleep(0.02)  # a reset overtakes what the client has not read yet
                self._reset()
        elif kind == "drip":
            for at in range(len(body)):
                self._write(body[at : at + 1])
                if state.closing.wait(0.05):
                    return
        else:
            self._write(body)

    def _write(self, body: bytes) -> None:
        for at in range(0, len(body), 2**18):
            self.wfile.write(body[at : at + 2**18])
            with self.server_state.lock:
                self.server_state.sent_bytes += len(body[at : at + 2**18])

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
