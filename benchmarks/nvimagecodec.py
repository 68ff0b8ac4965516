"""nvImageCodec's region decoder on the CPU: the same pixels? how fast? does it notice damage?

    pip install -e '.[bench]'
    python benchmarks/nvimagecodec.py SLIDE[=MPP] ... [--blocks 15] [--core N] [--out FILE]

It would stand between the native decoder and the portable one. Both take a tile's bytes with tables
spliced in and the colour space forced (rebuild_jpeg). Everyone decodes and pastes the same patches on
one core in turns: nvImageCodec decodes the seen part of all tiles of a block in one call, 16 columns
wider than needed, or pixels at the cut would differ; the portable way decodes whole tiles with
simplejpeg; the bare C loop, whose pixels are OpenSlide's (bare_loop.py checks that), preads besides. Then
every tile of a sample is cut short or has bytes flipped, and each decoder says whether it noticed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from bare_loop import BareLoop, Jobs, about_the_library
from common import about_this_run, in_turns, last_core, paired, pin, tissue, write_out
from numpy.typing import NDArray

from online_patching import PatchSampler, Slide, read_slide_index
from online_patching.decode.jpeg import rebuild_jpeg

SIZE_PX, BLOCK = 224, 64
SAMPLE = 100
MARGIN_PX = 16
Patches = NDArray[np.uint8]


@dataclass
class Subject:
    """A slide's bare loop, whose jobs everybody shares."""

    name: str
    loop: BareLoop
    sampler: PatchSampler

    def jobs(self, block: int) -> Jobs:
        """Which parts of which tiles a block of patches consists of."""
        draws = self.sampler.draw_batch(np.arange(block * BLOCK, (block + 1) * BLOCK))
        corners = zip(draws.x_px0, draws.y_px0, strict=True)
        return self.loop.jobs([(int(x), int(y)) for x, y in corners], SIZE_PX)

    def streams(self, jobs: Jobs) -> list[bytes]:
        """Whole JPEG streams of the jobs' tiles."""
        return [self.stream(int(row[0]), int(row[1])) for row in jobs.rows]

    def stream(self, start: int, length: int) -> bytes:
        """One tile's stream."""
        level = self.loop.level
        data = os.pread(self.loop.file, length, start)
        return rebuild_jpeg(level.codec, data, level.tile_width_px, level.tile_height_px)


class NvImageCodec:
    """Its CPU backend in one thread."""

    def __init__(self) -> None:
        self.nv = import_module("nvidia.nvimgcodec")
        self.decoder = self.nv.Decoder(
            device_id=self.nv.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[self.nv.Backend(self.nv.CPU_ONLY)],
        )

    def parts(
        self, streams: list[bytes], seen: list[tuple[int, int, int, int]]
    ) -> list[Patches | None]:
        """The (left, top, width, height) of each stream; None where it does not decode."""
        regions = [
            self.nv.CodeStream(stream).get_sub_code_stream(0, self.nv.Region(y, x, y + h, x + w))
            for stream, (x, y, w, h) in zip(streams, seen, strict=True)
        ]
        found = self.decoder.decode(regions)
        return [None if one is None else np.asarray(one.cpu()) for one in found]


def main() -> None:
    """Measure every slide, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--core", type=int, default=last_core())
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(args.core)
    packages = ("nvidia-nvimgcodec-cu13", "simplejpeg", "pillow")
    lines = [about_this_run(*packages), f"{about_the_library()}; core {args.core}"]
    codec = NvImageCodec()
    for given in args.slides:
        subject = opened(given)
        lines += ["", subject.name, *speed(subject, codec, args.blocks), *damage(subject, codec)]
    write_out(lines, args.out)


def opened(given: str) -> Subject:
    """A slide at its own µm/px."""
    path, _, mpp = given.partition("=")
    index = read_slide_index(path, mpp=float(mpp) if mpp else None)
    with Slide(index) as slide:
        sampler = PatchSampler([index], [tissue(slide)], size_px=SIZE_PX, mpp=index.mpp, seed=1)
    level = index.levels[0]
    tables = "own tables" if not level.codec.tables else "abbreviated"
    about = f"{level.codec.colour}, tiles of {level.tile_width_px} px, {tables}"
    return Subject(f"{Path(path).name} ({about})", BareLoop(index), sampler)


def speed(subject: Subject, codec: NvImageCodec, blocks: int) -> list[str]:
    """Patches a second, and whether the pixels are the bare loop's, which are OpenSlide's."""
    jobs = [subject.jobs(k) for k in range(blocks + 1)]

    def roi(k: int, margin: int = MARGIN_PX) -> Patches:
        areas = [wider(row, margin, subject.loop.level.tile_width_px) for row in jobs[k].rows]
        parts = codec.parts(subject.streams(jobs[k]), areas)
        return pasted(
            jobs[k], [trimmed(*one) for one in zip(parts, areas, jobs[k].rows, strict=True)]
        )

    def whole(k: int) -> Patches:
        tiles = [simplejpeg.decode_jpeg(s, "RGB", strict=True) for s in subject.streams(jobs[k])]
        return pasted(jobs[k], [cut(t, row) for t, row in zip(tiles, jobs[k].rows, strict=True)])

    works: dict[str, Callable[[int], Patches]] = {
        "nvImageCodec, regions": roi,
        "simplejpeg, whole tiles": whole,
        "bare C loop": lambda k: subject.loop.run(jobs[k]),
    }
    series = in_turns(works, blocks)
    ours = series["nvImageCodec, regions"].rates
    lines = []
    for margin in (0, MARGIN_PX):
        off = [roi(k, margin).astype(np.int16) - subject.loop.run(jobs[k]) for k in range(4)]
        largest, share = np.abs(off).max(), np.count_nonzero(off) / np.size(off)
        lines.append(
            f"  regions with {margin:2d} columns more on each side: {share * 1e6:.1f} of a million samples "
            f"differ from OpenSlide's, by up to {largest}"
        )
    for name, one in series.items():
        ratio = "" if one.rates is ours else f"; nvImageCodec / it {paired(ours, one.rates)}"
        lines.append(f"  {name:24s}{statistics.median(one.rates):7,.0f} patches/s{ratio}")
    return lines


def wider(row: NDArray[np.int64], margin: int, tile_px: int) -> tuple[int, int, int, int]:
    """A job's left, top, width and height, with more columns where the tile has them."""
    left, top, width, height = (int(v) for v in row[2:6])
    start, stop = max(left - margin, 0), min(left + width + margin, tile_px)
    return start, top, stop - start, height


def trimmed(
    part: Patches | None, area: tuple[int, int, int, int], row: NDArray[np.int64]
) -> Patches:
    """A part without its margin."""
    assert part is not None
    skip = int(row[2]) - area[0]
    return part[:, skip : skip + int(row[4])]


def cut(tile: Patches, row: NDArray[np.int64]) -> Patches:
    """What a job sees of its tile."""
    left, top, width, height = (int(v) for v in row[2:6])
    return tile[top : top + height, left : left + width]


def pasted(jobs: Jobs, parts: list[Any]) -> Patches:
    """Patches out of the parts of their tiles."""
    n = len(jobs.first) - 1
    out = np.full((n, SIZE_PX, SIZE_PX, 3), 255, np.uint8)
    owner = np.repeat(np.arange(n), np.diff(jobs.first))
    for i, part, row in zip(owner, parts, jobs.rows, strict=True):
        x, y = int(row[6]), int(row[7])
        out[i, y : y + part.shape[0], x : x + part.shape[1]] = part
    return out


def damage(subject: Subject, codec: NvImageCodec) -> list[str]:
    """How often each decoder notices; a silent half-wrong picture is what must not pass."""
    rng, level = np.random.default_rng(1), subject.loop.level
    some = rng.choice(len(subject.loop.ranges), SAMPLE)
    streams = [subject.stream(int(a), int(b - a)) for a, b in subject.loop.ranges[some]]
    area = (0, 0, level.tile_width_px, level.tile_height_px)
    cases = {
        "cut at two thirds": [s[: len(s) * 2 // 3] for s in streams],
        "cut by 16 bytes": [s[:-16] for s in streams],
        "two bytes flipped": [flipped(s, rng) for s in streams],
    }
    lines = [f"  damage noticed in {SAMPLE} tiles (nvImageCodec, simplejpeg in strict mode):"]
    for name, bad in cases.items():
        nv = sum(codec.parts([one], [area])[0] is None for one in bad)
        lines.append(f"    {name:20s}{nv:5d}{sum(raises(one) for one in bad):5d}")
    return lines


def flipped(stream: bytes, rng: np.random.Generator) -> bytes:
    """Two bytes in the middle third, where entropy-coded data is, made different."""
    data = bytearray(stream)
    for place in rng.integers(len(data) // 3, 2 * len(data) // 3, 2):
        data[place] ^= 0x55
    return bytes(data)


def raises(stream: bytes) -> bool:
    """Whether simplejpeg refuses."""
    try:
        simplejpeg.decode_jpeg(stream, "RGB", strict=True)
    except ValueError:
        return True
    return False


if __name__ == "__main__":
    main()
