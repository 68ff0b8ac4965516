"""One JPEG 2000 tile through every decoder one can install: whole, smaller, in part, in two threads.

    pip install pylibjpeg-openjpeg    # one of the peers; left out where it is absent
    python benchmarks/jpeg2000_decoders.py SLIDE=MPP ... [--tiles 40] [--blocks 5] [--out benchmarks/results/FILE.txt]

CPU time a tile, the least of the blocks, everybody in turns on the same stored tiles. "parts of tiles" are
those that random 224 px patches need. Two threads beside one: 2 is ideal on two idle cores.
"""

from __future__ import annotations

import argparse
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from common import about_this_run, write_out
from PIL import Image

from online_patching import SlideIndex, read_slide_index
from online_patching.decode import decode_tile, openjpeg
from online_patching.geometry import Box

Decoder = Callable[[bytes], Any]


def main() -> None:
    """Measure the tiles of every slide, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE=MPP")
    parser.add_argument("--tiles", type=int, default=40)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [about_this_run("imagecodecs", "pillow", "pylibjpeg-openjpeg"), openjpeg.about(), ""]
    for given in args.slides:
        name, _, mpp = given.partition("=")
        index = read_slide_index(name, mpp=float(mpp))
        tiles = stored(index, args.tiles)
        size = sum(map(len, tiles)) / len(tiles) / 1024
        lines.append(f"{Path(name).name}: {len(tiles)} tiles of {size:.0f} KB")
        lines += [*in_turns(decoders(index), tiles, args.blocks), ""]
    write_out(lines, args.out)


def stored(index: SlideIndex, count: int) -> list[bytes]:
    """Tiles of level 0 with something in them, spread over it."""
    level, data = index.levels[0], Path(index.uri).read_bytes()
    ranges = [level.byte_range(tile) for tile in range(level.n_tiles)]
    full = [data[start:stop] for start, stop in ranges if stop - start > 4000]
    return full[:: max(1, len(full) // count)][:count]


def decoders(index: SlideIndex) -> dict[str, Decoder]:
    """Who decodes what."""
    level = index.levels[0]
    side = (level.tile_width_px, level.tile_height_px)
    ours = partial(decode_tile, level.codec)
    boxes = patch_boxes(*side)
    found: dict[str, Decoder] = {
        "ours": lambda data: ours(data, *side),
        "imagecodecs": imagecodecs.jpeg2k_decode,
        "Pillow": pillow,
        "ours, at 1/2": lambda data: ours(data, *side, 2),
        "Pillow, at 1/2": partial(pillow, reduce=1),
        "ours, at 1/4": lambda data: ours(data, *side, 4),
        "Pillow, at 1/4": partial(pillow, reduce=2),
        "ours, parts of tiles": lambda data: ours(data, *side, 1, next(boxes)),
    }
    with suppress(ImportError):
        found["pylibjpeg-openjpeg"] = import_module("openjpeg").decode
    return found


def pillow(data: bytes, reduce: int = 0) -> np.ndarray[Any, Any]:
    """Pillow, as its documentation has it."""
    picture: Any = Image.open(io.BytesIO(data))
    picture.reduce = reduce
    return np.asarray(picture)


def patch_boxes(width: int, height: int) -> Iterator[Box]:
    """What random 224 px patches see of the tiles they touch, one after another, without end."""
    random = np.random.default_rng(0)
    while True:
        x, y = (int(v) for v in random.integers(0, (width, height)))
        for left in range(0, x + 224, width):
            for top in range(0, y + 224, height):
                box = Box(max(0, x - left), max(0, y - top),
                          min(width, x + 224 - left), min(height, y + 224 - top))  # fmt: skip
                if not box.empty:
                    yield box


def in_turns(works: dict[str, Decoder], tiles: list[bytes], blocks: int) -> list[str]:
    """The least CPU time a tile over the blocks, and what a second thread brings."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(blocks):
        for name, decode in works.items():
            began = time.process_time()
            for data in tiles:
                decode(data)
            spent[name].append((time.process_time() - began) / len(tiles) * 1e3)
    least = {name: min(times) for name, times in spent.items()}
    return [
        f"  {name:22s} {ms:6.2f} ms of CPU a tile, {ms / least['ours']:5.2f} of ours"
        + (
            f", two threads {threads(works[name], tiles):.2f} x one"
            if " at " not in name and "parts" not in name
            else ""
        )
        for name, ms in least.items()
    ]


def threads(decode: Decoder, tiles: list[bytes]) -> float:
    """Tiles a second of two threads over those of one."""
    rates = []
    for count in (1, 2):
        running = [
            threading.Thread(target=lambda: [decode(data) for data in tiles]) for _ in range(count)
        ]
        began = time.perf_counter()
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        rates.append(count * len(tiles) / (time.perf_counter() - began))
    return rates[1] / rates[0]


if __name__ == "__main__":
    main()
