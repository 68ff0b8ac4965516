"""Patches per second of the whole loader against OpenSlide and tiffslide, on one slide, in one run.

    python benchmarks/patches_per_second.py [SLIDE] [--mpp MPP] [--out benchmarks/results/FILE.txt]

Without a slide it draws a synthetic one.

Everyone reads the same 224 px patches, at tissue positions drawn by the sampler. Two cases: at
level 0's own µm/px (no resampling), and at 1.6 x that (the others read level 0 and resize with
Pillow). Readers take turns in short blocks and ratios are taken block by block, because machines
drift. "loader" is PatchLoader with one decode thread: sampling, planning, reading, decoding,
pasting and handing over; the others get their positions for nothing and one thread.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tiffslide
from PIL import Image

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchRef,
    PatchSampler,
    Slide,
    SlideIndex,
    read_slide_index,
)
from online_patching.decode import DECODER
from online_patching.testing import SyntheticSlide, write_tiff

SIZE_PX = 224
BLOCK = 48


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "slide",
        type=Path,
        nargs="?",
        help="a slide that OpenSlide and tiffslide open too; unset: a synthetic one",
    )
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, where the file carries none")
    parser.add_argument("--blocks", type=int, default=9, help=f"blocks of {BLOCK} patches a reader")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.slide is None:
            args.slide = write_tiff(Path(scratch) / "synthetic.svs", SyntheticSlide(1, 9000, 7000))
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Both cases on one slide."""
    index = read_slide_index(str(args.slide), mpp=args.mpp)
    lines = [
        (
            f"{args.slide.name}: {index.dimensions[0]} x {index.dimensions[1]} px, {index.codec}, "
            f"tiles {index.levels[0].tile_width_px} px; {SIZE_PX} px patches on tissue, one thread each"
        ),
        about_this_run(),
        "",
    ]
    with Slide(index) as slide:
        mask = tissue(slide)
    for times in (1.0, 1.6):
        lines += measure(str(args.slide), index, mask, index.mpp * times, times, args.blocks)
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text.rstrip() + "\n")


def measure(
    path: str, index: SlideIndex, mask: ForegroundMask, mpp: float, times: float, blocks: int
) -> list[str]:
    """One case: rates, and ratios of the loader to each peer, as medians over paired blocks."""
    sampler = PatchSampler([index], [mask], size_px=SIZE_PX, mpp=mpp, seed=1)
    openers = {"OpenSlide": openslide.OpenSlide(path), "tiffslide": tiffslide.TiffSlide(path)}
    loader = PatchLoader(sampler, BLOCK, threads=1, prefetch=1)
    rates: dict[str, list[float]] = {name: [] for name in ("loader", *openers)}
    for k in range(blocks + 1):  # block 0 warms caches up
        refs = sampler.refs(sampler.draw_batch(np.arange(k * BLOCK, (k + 1) * BLOCK)))
        work: dict[str, Callable[[], object]] = {"loader": loader.next_batch}
        for name, reader in openers.items():
            work[name] = partial(read_all, reader, refs, times)
        order = [*work][k % 3 :] + [*work][: k % 3]  # nobody always goes first
        found = {name: timed(work[name]) for name in order}
        if k:
            for name, seconds in found.items():
                rates[name].append(BLOCK / seconds)
    loader.close()
    rows = [f"at {mpp:.3f} µm/px ({times:g} x level 0)"]
    for name in openers:
        ratios = [a / b for a, b in zip(rates["loader"], rates[name], strict=True)]
        rows.append(
            f"  loader / {name:9s} {statistics.median(ratios):5.2f} x   ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    rows += [f"  {name:10s} {statistics.median(r):7.0f} patches/s" for name, r in rates.items()]
    return [*rows, ""]


def read_all(reader: Any, refs: list[PatchRef], times: float) -> list[np.ndarray]:
    """A block of patches, one after another."""
    return [peer(reader, ref, times) for ref in refs]


def peer(reader: Any, ref: PatchRef, times: float) -> np.ndarray:
    """The same patch as a careful user of the other library reads it."""
    side = round(SIZE_PX * times)
    region = reader.read_region((ref.x_px0, ref.y_px0), 0, (side, side)).convert("RGB")
    if side != SIZE_PX:
        region = region.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    return np.asarray(region)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tissue(slide: Slide) -> ForegroundMask:
    """Saturated enough to be stained; good enough to keep everyone off the glass."""
    hsv = np.asarray(Image.fromarray(slide.thumbnail(8.0)).convert("HSV"))
    return ForegroundMask.from_array(
        hsv[..., 1] > 25, slide.dimensions, (slide.index.mpp_x, slide.index.mpp_y)
    )


def about_this_run() -> str:
    """Date, commit, machine and versions."""
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, {cpu()}, Python {platform.python_version()}, "
        f"{DECODER}, OpenSlide {openslide.__library_version__}, tiffslide {version('tiffslide')}"
    )


def commit() -> str:
    """The commit measured, marked when the tree differs from it by more than results."""
    name = subprocess.run(
        ["git", "describe", "--always"], capture_output=True, text=True, check=False
    )
    differs = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
    dirty = subprocess.run(differs, check=False).returncode == 1
    return (name.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
