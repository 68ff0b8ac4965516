"""Random 224 px patches of NDPI: the whole loader against every reader that opens one; what a remote patch asks for.

    python benchmarks/ndpi_peers.py SLIDE[=MPP] [--side 8192] [--blocks 9] [--core N] [--times 1 1.5]
        [--scratch FOLDER] [--out benchmarks/results/FILE.txt]

No H&E NDPI may be passed on, so one is made: tissue of SLIDE, mirrored to a square, one JPEG stream a level
with libjpeg's restart markers (online_patching.testing.ndpi). Three shapes of tiles: 4096 x 8 px with chroma
halved across (256 MCUs an interval, what most scanners write), 640 x 8 px at full chroma, and one interval a row.
Readers, blocks, one core and ratios are those of reader_peers.py. Requests and bytes of a remote patch are
counted from its plan on a slide as wide as real ones (61,440 px), for three gaps, beside what the whole band of
rows would take.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import about_this_run, last_core, pin, write_out
from numpy.typing import NDArray
from reader_peers import PACKAGES, Subject, against_peers, opened

from online_patching import PatchRef, SlideIndex, open_slide
from online_patching.fetch import DEFAULT_GAP_BYTES, pieces_of
from online_patching.geometry import Box
from online_patching.plan import merge_ranges, plan_patch
from online_patching.testing.ndpi import write_ndpi
from online_patching.testing.writers import shrink

SHAPES: dict[str, dict[str, Any]] = {
    "4096 x 8 px, chroma halved across": {"interval_mcus": 256, "subsampling": "4:2:2"},
    "640 x 8 px": {"interval_mcus": 80},
    "one interval a row": {"interval_mcus": 10**6},
}
_PATCHES = 256


def main() -> None:
    """Make the slides, measure them, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--side", type=int, default=8192, help="of level 0, px: a multiple of 4096")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--times", type=float, nargs="*", default=[1.0, 1.5])
    parser.add_argument("--core", type=int, default=last_core())
    parser.add_argument("--scratch", type=Path, help="where the slides stay for the next run")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(args.core)
    lines = [about_this_run(*PACKAGES), ""]
    with tempfile.TemporaryDirectory() as folder:
        scratch = args.scratch or Path(folder)
        for name, options in SHAPES.items():
            size = (args.side, args.side)
            path = made(args.slide, size, scratch, options)
            lines += of_shape(name, opened(str(path), None, scratch), args.times, args.blocks)
        lines += ["a remote patch of a slide 61,440 px wide: requests, kB (means over draws)"]
        for name, options in SHAPES.items():
            path = made(args.slide, (61_440, 2_560), scratch, options)
            lines += ["", f"  {name}", *remote(opened(str(path), None, scratch), args.times)]
    write_out(lines, args.out)


def made(slide: str, size_px: tuple[int, int], scratch: Path, options: dict[str, Any]) -> Path:
    """An NDPI of three levels, as wide as whole tiles; the narrowest levels have no markers, as is usual."""
    tile = options["interval_mcus"] * (16 if "subsampling" in options else 8)
    width, height = size_px
    width = width if tile > width else -(-width // tile) * tile
    path = scratch / f"{tile}_{width}x{height}.ndpi"
    if not path.exists():
        name, _, mpp = slide.partition("=")
        with open_slide(name, mpp=float(mpp) if mpp else None) as source:
            side = min(4096, *source.dimensions)
            left, top = ((n - side) // 2 for n in source.dimensions)
            tissue = source.read_box(0, Box(left, top, left + side, top + side))
            um = source.mpp
        rows, columns = (mirrored(side, count) for count in (height, width))
        level0 = tissue[rows][:, columns]
        levels = [level0, shrink(level0, 4), shrink(level0, 16)]
        write_ndpi(path, levels, mpp=um, plain_below_px=width // 2, **options)
    return path


def mirrored(side: int, count: int) -> NDArray[np.int64]:
    """0, 1, ... side - 1, side - 1, ... 1, 0, 0, 1, ...: what to take to fill `count`."""
    there = np.arange(side)
    return np.resize(np.concatenate([there, there[::-1]]), count)


def of_shape(name: str, subject: Subject, times: list[float], blocks: int) -> list[str]:
    """All figures of one slide."""
    level, size = subject.index.levels[0], subject.path.stat().st_size
    about = (
        f"{name}: {level.width_px} x {level.height_px} px, tiles of {level.tile_width_px} x "
        f"{level.tile_height_px} px, {level.n_tiles:,} on level 0, {size / 1e6:.0f} MB"
    )
    print(about, flush=True)
    lines = [about]
    for factor in times:
        lines += ["", *against_peers(subject, factor, blocks, bare=False)]
    return [*lines, "", ""]


def remote(subject: Subject, times: list[float]) -> list[str]:
    """Requests and bytes of a patch, from plans alone."""
    lines = []
    for factor in times:
        sampler = subject.sampler(factor)
        draws = sampler.draw_batch(np.arange(_PATCHES))
        ranges = [ranges_of(subject.index, ref) for ref in sampler.refs(draws)]
        for gap in (0, DEFAULT_GAP_BYTES, 2**18):
            merged = [merge_ranges(some, gap) for some in ranges]
            lines.append(f"    at {factor:g} x, gaps up to {gap:>7,} bytes: {told(merged)}")
        bands = [band_of(subject.index, some) for some in ranges]
        lines.append(f"    at {factor:g} x, the whole band of rows:    {told(bands)}")
    return lines


Ranges = list[tuple[int, int]]


def ranges_of(index: SlideIndex, ref: PatchRef) -> Ranges:
    """The bytes that a patch needs."""
    pieces = pieces_of(index, plan_patch(index, ref))
    return [(piece.start, piece.stop or 0) for piece in pieces]


def band_of(index: SlideIndex, ranges: Ranges) -> Ranges:
    """From the first byte of the first row to the last of the last, as one request of at most 8 MiB each."""
    start, stop = min(a for a, _ in ranges), max(b for _, b in ranges)
    return [(at, min(stop, at + 2**23)) for at in range(start, stop, 2**23)]


def told(merged: list[Ranges]) -> str:
    """Means as text."""
    requests = np.mean([len(some) for some in merged])
    size = np.mean([sum(b - a for a, b in some) for some in merged])
    return f"{requests:5.1f}, {size / 1e3:8,.1f}"


if __name__ == "__main__":
    main()
