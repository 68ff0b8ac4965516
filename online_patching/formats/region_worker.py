"""A process that opens slides with OpenSlide or tiffslide and may die doing it.

`python -m online_patching.formats.region_worker` answers requests on its standard input: a line
of JSON in, a line of JSON out, followed by `bytes` raw bytes. Native readers crash on hostile
files and latch errors; here that costs a slide, not the run. See fallback.py for the other end.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from typing import Any

_MAX_OPEN_SLIDES = 8


def _open(uri: str, reader: str) -> Any:
    if reader == "openslide":
        import openslide

        return openslide.OpenSlide(uri)
    import tiffslide

    return tiffslide.TiffSlide(uri)


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
    }


def _region(slide: Any, level: int, x: int, y: int, w: int, h: int) -> bytes:
    import numpy as np

    scale = slide.level_downsamples[level]
    picture = slide.read_region((round(x * scale), round(y * scale)), level, (w, h))
    pixels = np.asarray(picture.convert("RGBA") if hasattr(picture, "convert") else picture)
    rgb = pixels[..., :3]
    if pixels.shape[-1] == 4:  # what was never scanned is transparent: white, like glass
        rgb = np.where(pixels[..., 3:] == 0, 255, rgb)
    return np.ascontiguousarray(rgb, dtype=np.uint8).tobytes()


def _version(uri: str) -> tuple[int, int]:
    """Size and time of a local file, so that a slide put in another's place is opened anew."""
    try:
        now = os.stat(uri)
    except OSError:
        return 0, 0
    return now.st_size, now.st_mtime_ns


def main() -> None:
    """Answer requests until standard input ends."""
    slides: OrderedDict[tuple[str, str, tuple[int, int]], Any] = OrderedDict()
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library's print must not enter the protocol
    for line in stdin:
        request = json.loads(line)
        body = b""
        try:
            key = (request["uri"], request["reader"], _version(request["uri"]))
            if key not in slides:
                slides[key] = _open(*key[:2])
                while len(slides) > _MAX_OPEN_SLIDES:
                    slides.popitem(last=False)[1].close()
            slides.move_to_end(key)
            if request["op"] == "describe":
                answer = _describe(slides[key])
            else:
                body = _region(slides[key], *request["box"])
                answer = {}
        except Exception as error:
            slides.pop(key, None)  # OpenSlide latches an error: never ask that handle again
            answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        stdout.write(json.dumps({**answer, "bytes": len(body)}).encode() + b"\n" + body)
        stdout.flush()


if __name__ == "__main__":
    main()
