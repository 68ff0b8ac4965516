"""The bare C loop: what is left when everything but pread, decoding and pasting is taken away.

    python benchmarks/bare_loop.py SLIDE[=MPP] ... [--patches 2000] [--core N]

bare_loop.c is compiled with `cc` against libjpeg-turbo's headers and linked with the very library
that Pillow ships, which the loader's native decoder loads too. `BareLoop` is what other scripts use.
Run by itself it checks every pixel of 64 patches against OpenSlide and prints patches a second.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import openslide
from common import last_core, pin, tissue
from numpy.typing import NDArray
from PIL import features

from online_patching import PatchSampler, Slide, SlideIndex, read_slide_index

SIZE_PX = 224
_HERE = Path(__file__).parent
_VENDORED = _HERE.parent / "online_patching" / "native" / "include"


def libjpeg() -> Path:
    """The libjpeg-turbo inside Pillow's wheel."""
    pillow = distribution("pillow")
    found = [f for f in pillow.files or () if f.name.startswith("libjpeg-")]
    if not found:
        raise SystemExit("this Pillow ships no libjpeg-turbo: install its wheel from PyPI.")
    return Path(str(pillow.locate_file(found[0]))).resolve()


def about_the_library() -> str:
    """Which libjpeg-turbo the loop runs on."""
    return (
        f"bare loop on libjpeg-turbo {features.version_feature('libjpeg_turbo')} of Pillow's wheel"
    )


@cache
def compiled() -> ctypes.CDLL:
    """bare_loop.c, compiled into a temporary folder and loaded."""
    library = libjpeg()
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "bare_loop.so"
        include = [f"-I{_VENDORED}"] if (_VENDORED / "jpeglib.h").exists() else []
        subprocess.run(
            ["cc", "-O3", "-march=native", "-Wall", "-shared", "-fPIC", *include, str(_HERE / "bare_loop.c"),
             "-o", str(built), str(library), f"-Wl,-rpath,{library.parent}"],
            check=True,
        )  # fmt: skip
        loaded = ctypes.CDLL(str(built))
    loaded.bare_loop.restype = ctypes.c_double
    return loaded


@dataclass
class Jobs:
    """Which bytes to decode and where their pixels go: rows of Job in bare_loop.c, patch by patch."""

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    side: int
    overhang: bool


class BareLoop:
    """Patches of one level of one local slide."""

    def __init__(self, index: SlideIndex, level: int = 0) -> None:
        self.level, self.codec = index.levels[level], index.levels[level].codec
        self.file = os.open(index.uri.removeprefix("file://"), os.O_RDONLY)
        self.tables = self.codec.tables or b""
        tiles = range(self.level.n_tiles)
        self.ranges = np.array([self.level.byte_range(i) for i in tiles], np.int64)
        self.out = np.empty((0, 0, 0, 3), np.uint8)
        self.seconds = 0.0

    def jobs(self, corners: list[tuple[int, int]], side: int, scale: int = 1) -> Jobs:
        """For patches of `side` px at these corners (px of the level decoded at 1 / scale)."""
        width, height = (-(-s // scale) for s in (self.level.width_px, self.level.height_px))
        w, h = self.level.tile_width_px // scale, self.level.tile_height_px // scale
        rows, first = [], [0]
        overhang = any(min(x, y) < 0 or x + side > width or y + side > height for x, y in corners)
        for x, y in corners:
            right, bottom = min(x + side, width), min(y + side, height)
            for row in range(max(y, 0) // h, -(-bottom // h)):
                for column in range(max(x, 0) // w, -(-right // w)):
                    start, stop = self.ranges[row * self.level.columns + column]
                    left, top = max(x - column * w, 0), max(y - row * h, 0)
                    seen_w = min(right - column * w, w) - left
                    seen_h = min(bottom - row * h, h) - top
                    to = column * w + left - x, row * h + top - y
                    rows.append((start, stop - start, left, top, seen_w, seen_h, *to))
            first.append(len(rows))
        return Jobs(np.array(rows, np.int64), np.array(first, np.int64), side, overhang)

    def run(self, jobs: Jobs, scale: int = 1) -> NDArray[np.uint8]:
        """The patches (n, side, side, 3); white where no tile is. The buffer is used again."""
        n = len(jobs.first) - 1
        if self.out.shape != (n, jobs.side, jobs.side, 3):
            self.out = np.empty((n, jobs.side, jobs.side, 3), np.uint8)
        if jobs.overhang:
            self.out.fill(255)
        seconds = compiled().bare_loop(
            self.file, self.tables, ctypes.c_int64(len(self.tables)), self.codec.colour == "ycbcr", scale,
            ctypes.c_void_p(jobs.rows.ctypes.data), ctypes.c_void_p(jobs.first.ctypes.data),
            ctypes.c_int64(n), ctypes.c_int64(jobs.side), ctypes.c_int64(int(jobs.rows[:, 1].max())),
            ctypes.c_int64(self.level.tile_width_px), ctypes.c_void_p(self.out.ctypes.data),
        )  # fmt: skip
        if seconds < 0:
            raise SystemExit("the bare loop could not read or decode a tile")
        self.seconds = float(seconds)
        return self.out


def main() -> None:
    """Check pixels, then time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--patches", type=int, default=2000)
    parser.add_argument("--core", type=int, default=last_core())
    args = parser.parse_args()
    pin(args.core)
    print(about_the_library())
    for given in args.slides:
        path, _, mpp = given.partition("=")
        index = read_slide_index(path, mpp=float(mpp) if mpp else None)
        with Slide(index) as slide:
            sampler = PatchSampler([index], [tissue(slide)], size_px=SIZE_PX, mpp=index.mpp, seed=1)
        draws = sampler.draw_batch(np.arange(args.patches))
        corners = [(int(x), int(y)) for x, y in zip(draws.x_px0, draws.y_px0, strict=True)]
        loop = BareLoop(index)
        worst = check(loop, path, corners[:64])
        jobs = loop.jobs(corners, SIZE_PX)
        best = min(timed(loop, jobs) for _ in range(3))
        print(
            f"{index.slide_id}: {args.patches / best:,.0f} patches/s, {len(jobs.rows) / args.patches:.2f} tiles "
            f"a patch; largest difference from OpenSlide over 64 patches: {worst}"
        )


def timed(loop: BareLoop, jobs: Jobs) -> float:
    """Seconds in C, without the call."""
    loop.run(jobs)
    return loop.seconds


def check(loop: BareLoop, path: str, corners: list[tuple[int, int]]) -> int:
    """The largest difference of any sample from OpenSlide's."""
    size = (SIZE_PX, SIZE_PX)
    ours = loop.run(loop.jobs(corners, SIZE_PX)).astype(np.int16)
    with openslide.OpenSlide(path) as slide:
        theirs = [np.asarray(slide.read_region(c, 0, size).convert("RGB")) for c in corners]
    return int(np.abs(ours - np.stack(theirs)).max())


if __name__ == "__main__":
    main()
