"""A real HTTP server in a thread, with ranges and ETags, that can be told to misbehave."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType


@dataclass
class Faults:
    """What goes wrong, until `count` is used up (-1: for ever). Counted in `FaultServer.seen`."""

    kind: str = ""  # "500", "ignore-range", "truncate", "hang", "wrong-range", "flood", "403"
    count: int = -1
    only_data: bool = False  # leave the one-byte version probe alone


@dataclass
class FaultServer:
    root: Path
    faults: Faults = field(default_factory=Faults)
    etag: str = '"one"'
    delay_s: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.ranges: list[tuple[str, int, int]] = []
        self.concurrent = self.most_concurrent = 0
        outer = self

        class Handler(_Handler):
            server_state = outer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, start: int, stop: int) -> str:
        with self.lock:
            if not self.faults.kind or self.faults.count == 0:
                return ""
            if self.faults.only_data and stop - start <= 1:
                return ""
            self.faults.count -= 1
            self.seen[self.faults.kind] += 1
            return self.faults.kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FaultServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        state = self.server_state
        with state.lock:
            state.seen["requests"] += 1
            state.concurrent += 1
            state.most_concurrent = max(state.most_concurrent, state.concurrent)
        try:
            self._answer(state)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with state.lock:
                state.concurrent -= 1

    def _answer(self, state: FaultServer) -> None:
        time.sleep(state.delay_s)
        path = state.root / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            return self._send(404, b"")
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return self._send(200, data)
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if self.headers.get("If-Match", state.etag) != state.etag:
            return self._send(412, b"")
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        kind = state.fault(start, stop)
        with state.lock:
            state.ranges.append((self.path, start, stop))
        if kind in ("500", "403"):
            return self._send(int(kind), b"no")
        if kind == "ignore-range":
            return self._send(200, data)
        if kind == "hang":
            time.sleep(3)
        shift = 1 if kind == "wrong-range" else 0
        head = {"Content-Range": f"bytes {start + shift}-{stop - 1 + shift}/{len(data)}"}
        body = data[start:stop] + (bytes(2**21) if kind == "flood" else b"")
        self._send(206, body, head, cut=kind == "truncate")
        return None

    def _send(
        self, status: int, body: bytes, more: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"ETag": self.server_state.etag, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)
