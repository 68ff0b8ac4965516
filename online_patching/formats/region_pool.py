"""The parent's end of region_worker processes: as many as threads ask at once, up to a bound."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching import errors
from online_patching.errors import DamagedSlideError, PatchingError, StoreError
from online_patching.geometry import Box
from online_patching.slide_index import SlideIndex

MOST_WORKERS = min(8, os.cpu_count() or 1)
"""Processes that one process starts at most: one a core, each of about 100 MB."""

_TIMEOUT_S = 120.0


class RegionWorker:
    """The parent's end of one region_worker process; one request at a time, restarted when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.pid = os.getpid()
        self.last_uri = ""

    def describe(
        self, uri: str, reader: str, size_bytes: int = 0, token: str = ""
    ) -> dict[str, Any]:
        """Level sizes and the properties that matter."""
        request = {"op": "describe", "uri": uri, "reader": reader}
        return self._ask({**request, "size_bytes": size_bytes, "token": token})[0]

    def read(self, index: SlideIndex, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels (height, width, 3) of a box on a level; white outside the slide."""
        request = {
            "op": "region", "uri": index.uri, "reader": index.container,
            "size_bytes": index.size_bytes, "token": index.token,
            "box": [level, box.left, box.top, box.width, box.height],
        }  # fmt: skip
        data = self._ask(request)[1]
        if len(data) != box.width * box.height * 3:
            raise DamagedSlideError(
                index.uri, f"{index.container} gave {len(data):,} bytes for {box}."
            )
        return np.frombuffer(data, np.uint8).reshape(box.height, box.width, 3)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            self.last_uri = request["uri"]
            try:
                answer, body = self._exchange(request)
            except (OSError, ValueError) as error:
                self.close()
                why = f"the {request['reader']} process died or hung on it ({error})."
                raise DamagedSlideError(request["uri"], why) from None
        if "error" in answer:
            raise _error(request["uri"], answer)
        return answer, body

    def _exchange(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # Our own module, no shell; stderr is dropped: native readers chat there.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "online_patching.formats.region_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + _TIMEOUT_S
        head = bytearray()
        while not head.endswith(b"\n"):
            head += self._receive(1, deadline)
        answer = json.loads(bytes(head))
        body = bytearray()
        while len(body) < answer["bytes"]:
            body += self._receive(answer["bytes"] - len(body), deadline)
        return answer, bytes(body)

    def _receive(self, count: int, deadline: float) -> bytes:
        assert self._process and self._process.stdout
        ready, _, _ = select.select(
            [self._process.stdout], [], [], max(0.0, deadline - time.monotonic())
        )
        data = self._process.stdout.read(count) if ready else b""
        if not data:
            raise OSError("no answer" if not ready else "its output ended")
        return data


def _error(uri: str, answer: dict[str, Any]) -> PatchingError:
    """The error that the process told of: a store's own kind where it was one, else the slide's fault."""
    kind = getattr(errors, answer.get("kind") or "DamagedSlideError", DamagedSlideError)
    if kind is StoreError:
        return StoreError(uri, answer["error"], answer["code"])
    if issubclass(kind, StoreError):
        return kind(uri, answer["error"])
    return DamagedSlideError(uri, answer["error"])


class RegionPool:
    """Region workers shared by threads: one for each thread that asks, up to `most`; others wait.

    A worker that has the slide open is preferred, and an idle one to a new one.
    """

    def __init__(self, most: int = MOST_WORKERS) -> None:
        self.most, self.pid = most, os.getpid()
        self._idle: list[RegionWorker] = []
        self._all: list[RegionWorker] = []
        self._free = threading.Condition()

    def describe(
        self, uri: str, reader: str, size_bytes: int = 0, token: str = ""
    ) -> dict[str, Any]:
        """Level sizes and the properties that matter."""
        worker = self._take(uri)
        try:
            return worker.describe(uri, reader, size_bytes, token)
        finally:
            self._give(worker)

    def read(self, index: SlideIndex, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels (height, width, 3) of a box on a level; white outside the slide."""
        worker = self._take(index.uri)
        try:
            return worker.read(index, level, box)
        finally:
            self._give(worker)

    def close(self) -> None:
        """End all processes."""
        for worker in self._all:
            worker.close()

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._all)

    def _take(self, uri: str) -> RegionWorker:
        with self._free:
            while not self._idle and len(self._all) >= self.most:
                self._free.wait()
            for worker in reversed(self._idle):
                if worker.last_uri == uri:
                    self._idle.remove(worker)
                    return worker
            if self._idle:
                return self._idle.pop()
            self._all.append(RegionWorker())
            return self._all[-1]

    def _give(self, worker: RegionWorker) -> None:
        with self._free:
            self._idle.append(worker)
            self._free.notify()


_pool: RegionPool | None = None
_pool_lock = threading.Lock()


def workers() -> RegionPool:
    """This process's region workers, started as they are needed."""
    global _pool
    with _pool_lock:
        if _pool is None or _pool.pid != os.getpid():
            _pool = RegionPool()
            atexit.register(_pool.close)
        return _pool
