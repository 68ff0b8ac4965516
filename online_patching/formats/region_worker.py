"""A process that opens slides with OpenSlide or tiffslide and may die doing it.

`python -m online_patching.formats.region_worker` answers requests on its standard input: a line
of JSON in, a line of JSON out, followed by `bytes` raw bytes. Native readers crash on hostile
files and latch errors; here that costs a slide, not the run. Remote objects are read through our own
stores (range_file.py), by tiffslide. See region_pool.py for the other end.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from online_patching import errors
from online_patching.errors import SlideError, StoreError, redact
from online_patching.formats.range_file import RangeFile
from online_patching.stores import Stores, is_remote

_MAX_OPEN_SLIDES = 8
_MOST_BYTES = {"describe": 64 * 2**20, "region": 256 * 2**20}
"""What one request may read of a remote object."""


@dataclass
class _Open:
    """A slide that is open, and the file that it is read from where that is remote."""

    slide: Any
    file: RangeFile | None

    def close(self) -> None:
        self.slide.close()
        if self.file is not None:
            self.file.close()


def _open(request: dict[str, Any], stores: Stores) -> _Open:
    uri, reader = request["uri"], request["reader"]
    if reader == "openslide":
        import openslide

        return _Open(openslide.OpenSlide(uri), None)
    import tiffslide

    if not is_remote(uri):
        return _Open(tiffslide.TiffSlide(uri), None)
    file = RangeFile(stores, uri, request["token"], request["size_bytes"])
    file.left = _MOST_BYTES["describe"]
    name = redact(uri).rpartition("/")[2]
    try:
        return _Open(tiffslide.TiffSlide(file, tifffile_options={"name": name}), file)
    except Exception:
        if file.error is not None:
            raise file.error from None
        raise


def _describe(slide: Any) -> dict[str, Any]:
    keep = (
        "mpp",
        "vendor",
        "quickhash",
        "ondition",
        "Excitation",
        "SeriesInstanceUID",
        "tile-width",
        "tile-height",
    )
    properties = {
        str(k): str(v)[:2000]
        for k, v in slide.properties.items()
        if any(part in f"{k} {v}" for part in keep)
    }
    return {
        "levels": [list(map(int, d)) for d in slide.level_dimensions],
        "downsamples": [float(d) for d in slide.level_downsamples],
        "properties": properties,
        "overlaps": _overlaps(slide),
    }


def _overlaps(slide: Any) -> bool:
    """Whether tiffslide, which does not heed it, opened a container of overlapping tiles."""
    file = getattr(slide, "ts_tifffile", None)
    if file is None:
        return False
    return bool(file.is_bif) or str(file.pages.first.software).startswith("MedScan")


def _region(slide: Any, reader: str, level: int, x: int, y: int, w: int, h: int) -> bytes:
    import numpy as np

    scale = slide.level_downsamples[level]
    place = _rounded_up if reader == "tiffslide" else round
    picture = slide.read_region((place(x * scale), place(y * scale)), level, (w, h))
    pixels = np.asarray(picture.convert("RGBA") if hasattr(picture, "convert") else picture)
    rgb = pixels[..., :3]
    if pixels.shape[-1] == 4:  # what was never scanned is transparent: white, like glass
        rgb = np.where(pixels[..., 3:] == 0, 255, rgb)
    return np.ascontiguousarray(rgb, dtype=np.uint8).tobytes()


def _rounded_up(value: float) -> int:
    """tiffslide divides again and rounds down: only from above does it come back to the pixel meant."""
    return int(value) + (value - int(value) > 1e-6)


def _version(uri: str) -> tuple[int, int]:
    """Size and time of a local file, so that a slide put in another's place is opened anew."""
    try:
        now = os.stat(uri)
    except OSError:
        return 0, 0
    return now.st_size, now.st_mtime_ns


class _Server:
    """The slides that are open, and answers about them."""

    def __init__(self) -> None:
        self.stores = Stores()
        self.slides: OrderedDict[tuple[Any, ...], _Open] = OrderedDict()

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What is told and what is sent behind it; an error is told too."""
        uri = request["uri"]
        version = (request["token"],) if is_remote(uri) else _version(uri)
        key = (uri, request["reader"], *version)
        try:
            if key not in self.slides:
                self.slides[key] = _open(request, self.stores)
                while len(self.slides) > _MAX_OPEN_SLIDES:
                    self.slides.popitem(last=False)[1].close()
            self.slides.move_to_end(key)
            return _ask(self.slides[key], request)
        except Exception as error:
            gone = self.slides.pop(
                key, None
            )  # OpenSlide latches an error: never ask that handle again
            seen = gone.file.error if gone is not None and gone.file is not None else None
            return _told(seen or error, uri), b""


def _ask(opened: _Open, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if opened.file is not None:
        opened.file.left = _MOST_BYTES[request["op"]]
    if request["op"] == "describe":
        found: tuple[dict[str, Any], bytes] = _describe(opened.slide), b""
    else:
        found = {}, _region(opened.slide, request["reader"], *request["box"])
    if opened.file is not None and opened.file.error is not None:  # swallowed on the way
        raise opened.file.error
    return found


def _told(error: Exception, uri: str) -> dict[str, Any]:
    """An error as it crosses to the parent: ours by kind and reason, others by a line without the URI's secrets."""
    if isinstance(error, SlideError | StoreError):
        kinds = (
            kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__
        )
        return {"error": error.reason, "kind": next(kinds), "code": error.code}
    text = f"{type(error).__name__}: {error}".replace(uri, redact(uri))
    return {"error": text[:200]}


def main() -> None:
    """Answer requests until standard input ends."""
    server = _Server()
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library's print must not enter the protocol
    for line in stdin:
        answer, body = server.answer(json.loads(line))
        stdout.write(json.dumps({**answer, "bytes": len(body)}).encode() + b"\n" + body)
        stdout.flush()
    server.stores.close()


if __name__ == "__main__":
    main()
