"""Random patches out of DICOM: one slide and the whole PatchLoader beside wsidicom and OpenSlide.

    python benchmarks/dicom_peers.py FOLDER [--mpp MPP] [--blocks N] [--only NAME] [--out benchmarks/results/FILE.txt]

FOLDER is a series of instances, or any slide. It is read as it is ("as it is", where it is DICOM), and a square
of its tissue is written in the other ways of `WAYS`. Everyone reads 224 px patches of level 0 at the same tissue
positions, on one core:

- the PatchLoader with one decode thread: drawing, planning and delivering included, started anew each block;
- open_slide(...).read_region, patch by patch;
- wsidicom's read_region, with its own choice of decoder, and OpenSlide's, each to RGB.

wsidicom keeps 100 MB of decoded frames a slide and OpenSlide 32 MB: all of a square as small as these, and
next to nothing of a cohort drawn at random. Both are given 1 MiB. Readers take turns in blocks, nobody always
first; ratios are taken block by block, of CPU and of rates. Before it is measured everyone's first patches are
compared, pixel by pixel. Where OpenSlide is missing it refuses that transfer syntax. Indexing is measured apart:
opening the slide and reading one patch.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
from common import Series, about_this_run, in_turns, last_core, paired, pin, tissue, write_out
from wsidicom import Settings, WsiDicom

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    Slide,
    open_slide,
    read_slide_index,
)
from online_patching.geometry import Box
from online_patching.slide_index import SlideIndex
from online_patching.testing.dicom import Written, write_dicom
from online_patching.testing.writers import pyramid

SIZE_PX, BATCH, BATCHES = 224, 64, 6
_CACHE_BYTES = 2**20
WAYS = {
    "jpeg, full": Written(tile_px=(256, 256)),
    "jpeg, sparse": Written(tile_px=(256, 256), organization="TILED_SPARSE", table="extended"),
    "jpeg, 512 px frames": Written(tile_px=(512, 512)),
    "jpeg 2000": Written(tile_px=(256, 256), syntax="jpeg2000"),
    "run lengths": Written(tile_px=(256, 256), syntax="rle"),
    "not compressed": Written(tile_px=(256, 256), syntax="explicit"),
}
Corners = list[tuple[int, int]]
Read = Callable[[Corners], list[np.ndarray]]


def ours(index: SlideIndex) -> Read:
    """Patch by patch."""
    slide = Slide(index)
    return lambda corners: [slide.read_region(c, 0, (SIZE_PX, SIZE_PX)) for c in corners]


def of_wsidicom(folder: Path) -> Read:
    """wsidicom, as RGB arrays."""
    settings = Settings(
        decoded_frame_cache_size=_CACHE_BYTES, encoded_frame_cache_size=_CACHE_BYTES
    )
    slide = WsiDicom.open(folder, settings=settings)
    size = (SIZE_PX, SIZE_PX)
    return lambda corners: [
        np.asarray(slide.read_region(c, 0, size).convert("RGB")) for c in corners
    ]


def of_openslide(folder: Path) -> Read:
    """OpenSlide, as RGB arrays; OpenSlideError where it refuses the slide."""
    largest = max(folder.glob("*"), key=lambda file: file.stat().st_size)
    slide = openslide.OpenSlide(largest)
    slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
    size = (SIZE_PX, SIZE_PX)
    return lambda corners: [
        np.asarray(slide.read_region(c, 0, size).convert("RGB")) for c in corners
    ]


def compare(name: str, folder: Path, mask: ForegroundMask, blocks: int) -> list[str]:
    """One slide, read by everyone."""
    index = read_slide_index(str(folder))
    sampler = PatchSampler([index], [mask], size_px=SIZE_PX, mpp=index.mpp, seed=1)
    count = BATCH * 2
    refs = sampler.refs(sampler.draw_batch(np.arange(count * (blocks + 1))))
    corners = [(round(ref.x_px0), round(ref.y_px0)) for ref in refs]
    readers: dict[str, Read] = {"slide": ours(index), "wsidicom": of_wsidicom(folder)}
    lines = [f"{name}: {index.codec}, {len(index.objects) or 1} instances"]
    try:
        readers["OpenSlide"] = of_openslide(folder)
    except openslide.OpenSlideError as error:
        lines.append(f"  OpenSlide refuses it: {str(error).rpartition(': ')[2]}")
    first = readers["slide"](corners[:32])
    for who, read in readers.items():
        assert all((a == b).all() for a, b in zip(first, read(corners[:32]), strict=True)), who

    def loader(_: int) -> range:
        with PatchLoader(sampler, BATCH, threads=1, prefetch=1) as running:
            for _ in range(BATCHES):
                assert not running.next_batch().failures
        return range(BATCH * BATCHES)

    def block_of(read: Read) -> Callable[[int], list[np.ndarray]]:
        return lambda k: read(corners[k * count : (k + 1) * count])

    series = in_turns({"loader": loader} | {w: block_of(r) for w, r in readers.items()}, blocks)
    return [*lines, *table(series), opening(folder, corners[0]), ""]


def table(series: dict[str, Series]) -> list[str]:
    """Ratios to the better peer first, then everyone."""
    peers = [who for who in ("wsidicom", "OpenSlide") if who in series]
    best = min(peers, key=lambda who: float(np.median(series[who].cpu_us)))
    lines = [
        f"  CPU, {best} / {who:7s} {paired(series[best].cpu_us, series[who].cpu_us)}"
        f"   rate, {who} / {best} {paired(series[who].rates, series[best].rates)}"
        for who in ("loader", "slide")
    ]
    for who, found in series.items():
        rate, cpu = np.median(found.rates), np.median(found.cpu_us)
        lines.append(f"    {who:12s} {rate:9.1f} patches/s  {cpu:8.0f} µs CPU")
    return lines


def opening(folder: Path, corner: tuple[int, int]) -> str:
    """Milliseconds from nothing to one patch, the best of five."""

    def one(make: Callable[[], Read]) -> str:
        best = float("inf")
        for _ in range(5):
            clock = time.perf_counter()
            make()([corner])
            best = min(best, time.perf_counter() - clock)
        return f"{best * 1e3:.1f}"

    told = [f"ours {one(lambda: ours(read_slide_index(str(folder))))}"]
    told.append(f"wsidicom {one(lambda: of_wsidicom(folder))}")
    with contextlib.suppress(openslide.OpenSlideError):
        told.append(f"OpenSlide {one(lambda: of_openslide(folder))}")
    return f"  opened and one patch read, ms: {', '.join(told)}"


def square(slide: Path, mpp: float | None, side_px: int) -> np.ndarray:
    """The square with most tissue."""
    with open_slide(str(slide), mpp=mpp) as opened:
        mask, (width, height) = tissue(opened), opened.dimensions
        corners = [
            (x, y)
            for x in range(0, max(1, width - side_px), 512)
            for y in range(0, max(1, height - side_px), 512)
        ]
        x, y = max(corners, key=lambda c: mask.fraction(c[0], c[1], side_px, side_px))
        return opened.read_box(0, Box(x, y, min(x + side_px, width), min(y + side_px, height)))


def main() -> None:
    """Write the slides, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", type=Path)
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, where the file carries none")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--side", type=int, default=4096, help="pixels of the square")
    parser.add_argument("--only", help="ways whose names hold this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    pin(last_core())
    lines = [
        f"{args.slide.name}; {SIZE_PX} px patches of level 0, one core",
        about_this_run("wsidicom", "pydicom", "openslide-bin", "imagecodecs", "pillow"),
        "",
    ]
    if args.slide.is_dir() and not args.only:
        with open_slide(str(args.slide)) as slide:
            mask = tissue(slide)
        lines += compare("as it is", args.slide, mask, args.blocks)
    levels = pyramid(square(args.slide, args.mpp, args.side), (4.0, 16.0))
    for name, how in WAYS.items():
        if args.only and args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as made:
            folder = write_dicom(Path(made) / "slide", levels, how)
            with open_slide(str(folder)) as slide:
                mask = tissue(slide)
            lines += compare(name, folder, mask, args.blocks)
            print(lines[-2], flush=True)
    write_out(lines, args.out)


if __name__ == "__main__":
    main()
