"""Containers whose tiles are not independent byte ranges, through OpenSlide, else tiffslide.

Local only, region by region, in a child process that may die (region_worker.py). The index says
so: its container is the reader's name and its levels have no tile rows.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import DamagedSlideError, NotASlideError
from online_patching.formats.vendors import Mpp, refuse_fluorescence, require_mpp
from online_patching.geometry import Box
from online_patching.slide_index import Codec, Level, SlideIndex

_TIMEOUT_S = 120.0
_READERS = ("openslide", "tiffslide")
_DICOM = (".dcm", ".dicom")


def read_index(uri: str, slide_id: str, override: Mpp | None) -> SlideIndex:
    """The index of whatever OpenSlide or tiffslide opens; NotASlideError with both reasons else."""
    reasons = []
    for reader in _READERS:
        for path in _candidates(uri):
            try:
                found = worker().describe(path, reader)
            except DamagedSlideError as error:
                why = " ".join(error.reason.replace(path, Path(path).name).split())  # one line
                reasons.append(f"{reader}: {why[:140]}")
                continue
            return _index(path, slide_id, reader, found, override)
    raise NotASlideError(uri, "no reader opens it (" + "; ".join(_two(reasons)) + ").")


def _two(reasons: list[str]) -> list[str]:
    """The first reason of each reader: a folder of instances would repeat itself."""
    return list({reason.partition(":")[0]: reason for reason in reversed(reasons)}.values())


def _candidates(uri: str) -> list[str]:
    """A file itself; of a DICOM folder each instance, since only volumes open a series."""
    path = Path(uri)
    if not path.is_dir():
        return [uri]
    return [str(p) for p in sorted(path.iterdir()) if p.suffix.lower() in _DICOM]


def _index(
    uri: str, slide_id: str, reader: str, found: dict[str, Any], override: Mpp | None
) -> SlideIndex:
    properties: dict[str, str] = found["properties"]
    refuse_fluorescence(uri, "\n".join(f"{k}={v}" for k, v in properties.items()))
    mpp = require_mpp(uri, override, _vendor_mpp(properties, reader))
    width, height = found["levels"][0]
    levels = []
    for number, (w, h) in enumerate(found["levels"]):
        tile = [
            int(properties.get(f"openslide.level[{number}].tile-{side}", 256))
            for side in ("width", "height")
        ]
        dx, dy = width / w, height / h
        levels.append(Level(w, h, tile[0], tile[1], dx, dy, mpp.x * dx, mpp.y * dy, Codec("raw")))
    return SlideIndex(
        slide_id, uri, reader, properties.get(f"{reader}.vendor", reader), mpp.x, mpp.y, mpp.source,
        tuple(levels), content_hash=properties.get("openslide.quickhash-1", ""),
    )  # fmt: skip


def _vendor_mpp(properties: dict[str, str], reader: str) -> Mpp | None:
    try:
        x, y = (float(properties[f"{reader}.mpp-{axis}"]) for axis in "xy")
        return Mpp(x, y, "vendor tag")
    except (KeyError, ValueError):
        return None


class RegionWorker:
    """The parent's end of one region_worker process; one request at a time, restarted when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.pid = os.getpid()

    def describe(self, uri: str, reader: str) -> dict[str, Any]:
        """Level sizes and the properties that matter."""
        return self._ask({"op": "describe", "uri": uri, "reader": reader})[0]

    def read(self, index: SlideIndex, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels (height, width, 3) of a box on a level; white outside the slide."""
        request = {
            "op": "region", "uri": index.uri, "reader": index.container,
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
            try:
                answer, body = self._exchange(request)
            except (OSError, ValueError) as error:
                self.close()
                why = f"the {request['reader']} process died or hung on it ({error})."
                raise DamagedSlideError(request["uri"], why) from None
        if "error" in answer:
            raise DamagedSlideError(request["uri"], answer["error"])
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


_worker: RegionWorker | None = None
_worker_lock = threading.Lock()


def worker() -> RegionWorker:
    """This process's region worker, started on first use."""
    global _worker
    with _worker_lock:
        if _worker is None or _worker.pid != os.getpid():
            _worker = RegionWorker()
            atexit.register(_worker.close)
        return _worker
