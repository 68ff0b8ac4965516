"""Random 224 px patches on tissue from one slide's pixels stored in every codec: the loader against readers.

    pip install -e '.[bench]'
    python benchmarks/tiff_codecs.py [SLIDE] [--side 4096] [--blocks 7] [--core N] [--out benchmarks/results/FILE.txt]

A square of a real slide's level 0, mirrored to twice its sides (OpenSlide remembers 32 MB of tiles), is
written as a tiled TIFF of a single level (256 px tiles) in each codec: the same pixels for all. At level 0's
µm/px for all of them; JPEG 2000 besides at 2 x and 4 x coarser, where fewer resolutions are decoded, beside
the loader made to decode them all. "whole tiles" is the loader made to decode tiles whole instead of the
part it needs. Everything is pinned to one core, in blocks that take turns; "loader" is PatchLoader with one
decode thread, everything included. Peers get their positions for nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from common import Work, about_this_run, in_turns, last_core, pin, tissue, write_out
from numpy.typing import NDArray
from peers import SIZE_PX, installed_peers
from reader_peers import LOADER, Subject, corners_of, difference, read_block, table, take

from online_patching import PatchLoader, PatchSampler, Slide, SlideIndex, decode, read_slide_index
from online_patching.geometry import Box
from online_patching.testing.tiff_codecs import Coding, Layout, write_coded_tiff

_DEFAULT = (
    Path(__file__).parents[2] / "shared/data/wsi/converted/metastatic_sarcoma_liver_HE_crop4096.svs"
)
_PEERS = ("OpenSlide", "tiffslide", "cuCIM", "cuCIM, batched")
_PACKAGES = ("cucim-cu13", "openslide-bin", "tiffslide", "imagecodecs", "pillow")
WHOLE_TILES, ALL_RESOLUTIONS = "loader, whole tiles", "loader, all resolutions"
CODINGS = {
    "JPEG YCbCr 4:2:0 Q80": Coding(7, 6, subsampling="4:2:0", tables=True, level=80),
    "JPEG 2000, 9/7 at 38 dB (Aperio 33005)": Coding(33005, level=38),
    "JPEG 2000, 5/3 lossless YCbCr 4:2:2 (Aperio 33003)": Coding(33003, subsampling="4:2:2"),
    "JPEG 2000, 9/7 at 38 dB (34712)": Coding(34712, level=38),
    "raw": Coding(1),
    "PackBits": Coding(32773),
    "LZW, predictor": Coding(5, predictor=2),
    "Deflate, predictor": Coding(8, predictor=2),
    "Zstandard, predictor": Coding(50000, predictor=2),
    "Deflate, predictor, planes apart": Coding(8, predictor=2, planar=True),
    "WebP Q80": Coding(50001, level=80),
}


def main() -> None:
    """Write the square in every codec, measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", nargs="?", type=Path, default=_DEFAULT)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--core", type=int, default=last_core())
    parser.add_argument("--only", default="", help="codecs whose names hold this")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(args.core)
    picture = square(args.slide, args.mpp, args.side)
    lines = [about_this_run(*_PACKAGES), f"{args.slide.name}, {args.side} px, core {args.core}", ""]
    with tempfile.TemporaryDirectory() as folder:
        for name, coding in CODINGS.items():
            if args.only not in name:
                continue
            path = Path(folder) / "slide.tif"
            about = f"Aperio Image Library\r\n{args.side}x{args.side}|MPP = {args.mpp}"
            layout = Layout((256, 256), mpp=args.mpp, description=about if "Aperio" in name else "")
            write_coded_tiff(path, [picture], coding, layout)
            lines += [f"{name}: {path.stat().st_size / 2**20:.1f} MiB"]
            index = read_slide_index(str(path))
            jpeg2000 = index.levels[0].codec.kind == "jpeg2000"
            for times in (1.0, 2.0, 4.0) if jpeg2000 and "Aperio 33005" in name else (1.0,):
                lines += [*measured(path, index, times, args.blocks), ""]
                print("\n".join(lines[-12:]), flush=True)
    write_out(lines, args.out)


def square(slide: Path, mpp: float, side: int) -> NDArray[np.uint8]:
    """The middle of a slide's level 0, and its mirror images to the right and below."""
    with Slide(read_slide_index(str(slide), mpp=mpp)) as opened:
        width, height = opened.dimensions
        left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
        found = opened.read_box(0, Box(left, top, left + side, top + side))
    return np.pad(found, ((0, found.shape[0]), (0, found.shape[1]), (0, 0)), mode="symmetric")


def measured(path: Path, index: SlideIndex, times: float, blocks: int) -> list[str]:
    """One codec at one µm/px: ratios, rates, and whether everybody sees the same."""
    with Slide(index) as slide:
        subject = Subject(path, index, tissue(slide))
    sampler, side = subject.sampler(times), round(SIZE_PX * times)
    block = 64 if index.levels[0].codec.kind != "jpeg2000" else 16
    corners = [corners_of(sampler, k, block, 1) for k in range(blocks + 1)]
    dead = dies(path)
    with mock.patch.dict("sys.modules", {"cucim": None} if dead else {}):
        readers, missing = installed_peers(path, subject.mask, side)
    missing |= dict.fromkeys(("cuCIM", "cuCIM, batched"), dead) if dead else {}
    readers, seen = {name: readers[name] for name in _PEERS if name in readers}, []
    with ExitStack() as stack:
        loader = stack.enter_context(PatchLoader(sampler, block, threads=1, prefetch=1))
        ours = take(loader).copy()
        works: dict[str, Work] = {LOADER: lambda k: take(loader)}
        if index.levels[0].codec.kind != "jpeg":
            works[WHOLE_TILES] = in_whole_tiles(stack, sampler, block)
        if times > 1:
            works[ALL_RESOLUTIONS] = without_reductions(stack, subject, times, block)
        for name, read in list(readers.items()):
            try:
                seen.append(difference(name, ours, read(corners[0][:16], side)))
            except Exception as error:  # opens the file and cannot read it
                missing[name] = f"{type(error).__name__}: {str(error)[:100]}"
                continue
            works[name] = partial(read_block, read, corners, side)
        series = in_turns(works, blocks)
    lines = [f"  at {times:g} x level 0's µm/px"]
    own = [WHOLE_TILES, ALL_RESOLUTIONS]
    peers = {name: one for name, one in series.items() if name not in own}
    lines += ["    " + line for line in table(peers)]
    for name in own:
        if name in series:
            rate = statistics.median(series[name].rates)
            cpu = [b / a for a, b in zip(series[LOADER].cpu_us, series[name].cpu_us, strict=True)]
            lines.append(
                f"    loader / {name}: {statistics.median(cpu):.2f} x by CPU time ({rate:,.0f} patches/s)"
            )
    lines += ["    pixels of the loader's first patches beside:"] + ["      " + s for s in seen]
    left_out = {name: why for name, why in missing.items() if name in _PEERS}
    return lines + [f"    left out: {name} ({why})" for name, why in left_out.items()]


def dies(path: Path) -> str:
    """How a process ends that reads a region through cuCIM; "" where it ends well or raises."""
    program = (
        "import sys\ntry:\n import cucim\n cucim.CuImage(sys.argv[1]).read_region((9, 9), (300, 300), 0)"
        "\nexcept Exception: pass"
    )
    command = [sys.executable, "-c", program, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return "its process hangs"
    return f"its process ends with {done.returncode}" if done.returncode else ""


def in_whole_tiles(
    stack: ExitStack, sampler: PatchSampler, block: int
) -> Callable[[int], NDArray[np.uint8]]:
    """A loader that decodes whole tiles: made to while its block runs."""
    loader = stack.enter_context(PatchLoader(sampler, block, threads=1, prefetch=1))

    def run(_: int) -> NDArray[np.uint8]:
        with mock.patch.dict(decode._BOXES, clear=True):
            return take(loader)

    return run


def without_reductions(
    stack: ExitStack, subject: Subject, times: float, block: int
) -> Callable[[int], NDArray[np.uint8]]:
    """A loader whose index says that no tile can be halved."""
    index = subject.index
    levels = tuple(
        replace(level, codec=replace(level.codec, reductions=0)) for level in index.levels
    )
    sampler = replace(subject, index=replace(index, levels=levels)).sampler(times)
    loader = stack.enter_context(PatchLoader(sampler, block, threads=1, prefetch=1))
    return lambda _: take(loader)


if __name__ == "__main__":
    main()
