"""Random 224 px patches on tissue: the whole loader against every reader one can install, one core.

    pip install -e '.[bench]'
    python benchmarks/reader_peers.py SLIDE[=MPP] ... [--mirror SLIDE[=MPP] ...] [--mirror-rgb ...]
        [--scratch FOLDER] [--blocks 15] [--core N] [--out benchmarks/results/FILE.txt]

For each slide: at level 0's µm/px (exact); at 1.3 and 1.6 x (between levels); at 4 x where the slide
has but one level; and four patches a read beside one. The first three once more with `remember_bytes`,
after three times as many tiles were read as the level has. `--mirror` slides are made larger first
(larger_slides.py). Everything runs pinned to one core in blocks of 128 patches (32 at 4 x) that take
turns; ratios are taken block by block, medians come with the smallest and largest. "loader" is PatchLoader with one
decode thread: sampling, planning, reading, decoding, pasting, resampling, handing over. The others get
their positions for nothing, but for wsistream, whose whole pipeline runs. "bare C loop" is bare_loop.c:
pread, decode, paste, without resampling; at 4 x it decodes at quarter size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bare_loop import BareLoop, about_the_library
from common import Series, Work, about_this_run, in_turns, last_core, paired, pin, tissue, write_out
from larger_slides import larger
from numpy.typing import NDArray
from peers import SIZE_PX, Corners, Read, installed_peers

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    Slide,
    SlideIndex,
    native,
    read_slide_index,
)

BLOCK = 128
REMEMBER_BYTES = 2**28
LOADER, BARE = "loader", "bare C loop"
PACKAGES = ("cucim-cu13", "fastslide", "openslide-bin", "openslide-python", "tiffslide", "wsistream",
            "opencv-python-headless", "pillow")  # fmt: skip


@dataclass
class Subject:
    """A slide under measurement."""

    path: Path
    index: SlideIndex
    mask: ForegroundMask

    def sampler(self, times: float, **more: Any) -> PatchSampler:
        """Draws at a multiple of level 0's µm/px."""
        mpp = self.index.mpp * times
        return PatchSampler([self.index], [self.mask], size_px=SIZE_PX, mpp=mpp, seed=1, **more)


def main() -> None:
    """Measure every slide, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="*", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--mirror", nargs="*", default=[], help="made larger, YCbCr 4:2:0")
    parser.add_argument("--mirror-rgb", nargs="*", default=[], help="made larger, RGB 4:4:4")
    parser.add_argument("--scratch", type=Path, help="where larger slides stay for the next run")
    parser.add_argument("--times", type=float, nargs="*", default=[1.0, 1.3, 1.6, 4.0])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--core", type=int, default=last_core())
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(args.core)
    lines = [about_this_run(*PACKAGES), f"{about_the_library()}; core {args.core}", ""]
    with tempfile.TemporaryDirectory() as folder:
        scratch = args.scratch or Path(folder)
        given: list[tuple[str, bool | None]] = [(text, None) for text in args.slides]
        given += [(text, False) for text in args.mirror] + [
            (text, True) for text in args.mirror_rgb
        ]
        for text, rgb in given:
            subject = opened(text, rgb, scratch)
            lines += measured(subject, args.times, args.blocks)
    write_out(lines, args.out)


def opened(given: str, rgb: bool | None, scratch: Path) -> Subject:
    """The slide of "SLIDE[=MPP]", made larger unless `rgb` is None."""
    name, _, mpp = given.partition("=")
    path, um = Path(name), float(mpp) if mpp else None
    if rgb is not None:
        path = larger(path, scratch, mpp=um, rgb=rgb)
    index = read_slide_index(str(path), mpp=um)
    with Slide(index) as slide:
        return Subject(path, index, tissue(slide))


def measured(subject: Subject, times: list[float], blocks: int) -> list[str]:
    """All cases of one slide, as lines."""
    index = subject.index
    level = index.levels[0]
    lines = [
        (
            f"{subject.path.name}: {level.width_px} x {level.height_px} px, {len(index.levels)} levels, "
            f"{level.codec.colour} JPEG tiles of {level.tile_width_px} px"
        )
    ]
    print(lines[0], flush=True)
    for factor in times:
        if factor < 4 or len(index.levels) == 1:
            lines += ["", *against_peers(subject, factor, blocks)]
        if factor < 4 and native.AVAILABLE:
            lines += ["", *against_peers(subject, factor, blocks, remember_bytes=REMEMBER_BYTES)]
        print(lines[-1], flush=True)
    if 1.0 in times:
        lines += ["", *against_itself(subject, blocks)]
    return [*lines, "", ""]


def against_peers(
    subject: Subject, times: float, blocks: int, bare: bool = True, remember_bytes: int = 0
) -> list[str]:
    """One µm/px: who is how fast, and whether everybody sees the same.

    With `remember_bytes`, once three times as many tiles were read as the level has.
    """
    sampler, side = subject.sampler(times), round(SIZE_PX * times)
    scale, block = (4, BLOCK // 4) if times == 4 else (1, BLOCK)
    corners = [corners_of(sampler, k, block, scale) for k in range(blocks + 1)]
    readers, missing = installed_peers(subject.path, subject.mask, side)
    with PatchLoader(
        sampler, block, threads=1, prefetch=1, remember_bytes=remember_bytes
    ) as loader:
        ours = take(loader).copy()
        seen = agreement(readers, ours, corners[0], side)
        works: dict[str, Work] = {LOADER: lambda k: take(loader)}
        if bare:
            works[BARE] = run = bare_blocks(subject.index, corners, side, scale)
            if side // scale == SIZE_PX:
                seen.append(difference(BARE, ours, list(run(0))))
        for name, read in readers.items():
            works[name] = partial(read_block, read, corners, side)
        while remember_bytes and loader.stats.tiles < 3 * subject.index.levels[0].n_tiles:
            take(loader)
        series = in_turns(works, blocks)
        native.remember(0)  # it is the process's: the next case begins without
    title = "exact" if times == 1 else f"{times:g} x level 0"
    title += ", states inside tiles remembered" if remember_bytes else ""
    lines = [f"  at {subject.index.mpp * times:.3f} µm/px ({title}): {side} px of level 0 a patch"]
    lines += ["    " + line for line in table(series)]
    lines += ["    pixels of the loader's first patches beside:"] + ["      " + s for s in seen]
    return lines + [f"    left out: {name} ({why})" for name, why in missing.items()]


def corners_of(sampler: PatchSampler, number: int, block: int, scale: int) -> Corners:
    """Upper left corners of a block's draws: level-0 px, on the grid of a decode at 1 / scale."""
    draws = sampler.draw_batch(np.arange(number * block, (number + 1) * block))
    xy = np.floor(np.stack([draws.x_px0, draws.y_px0], axis=1) / scale + 0.5).astype(int) * scale
    return [(int(x), int(y)) for x, y in xy]


def bare_blocks(
    index: SlideIndex, corners: list[Corners], side: int, scale: int
) -> Callable[[int], NDArray[np.uint8]]:
    """The bare loop over the same blocks, its jobs made beforehand."""
    loop = BareLoop(index)
    jobs = [
        loop.jobs([(x // scale, y // scale) for x, y in some], side // scale, scale)
        for some in corners
    ]
    return lambda block: loop.run(jobs[block], scale)


def take(loader: PatchLoader) -> NDArray[np.uint8]:
    """The next batch's pixels."""
    return loader.next_batch().pixels


def read_block(
    read: Read, corners: list[Corners], side: int, block: int
) -> list[NDArray[np.uint8]]:
    """A block through a peer."""
    return read(corners[block], side)


def agreement(
    readers: dict[str, Read], ours: NDArray[np.uint8], corners: Corners, side: int
) -> list[str]:
    """How the peers' first 16 patches differ from the loader's."""
    return [
        difference(name, ours, read(corners[:16], side))
        for name, read in readers.items()
        if name != "wsistream"
    ]


def difference(name: str, ours: NDArray[np.uint8], theirs: list[NDArray[np.uint8]]) -> str:
    """Mean and largest difference in grey levels."""
    off = np.abs(ours[: len(theirs)].astype(np.int16) - np.stack(theirs)[..., :3])
    same = "equal" if not off.any() else f"mean {off.mean():.2f}, largest {off.max()}"
    return f"{name:16s} {same}"


def table(series: dict[str, Series]) -> list[str]:
    """Ratios first, then rates; the best peer by median rate is named."""
    rates = {name: statistics.median(one.rates) for name, one in series.items()}
    peers = [name for name in series if name not in (LOADER, BARE)]
    lines = []
    if peers:
        best = max(peers, key=lambda name: rates[name])
        lines.append(f"loader / best peer      {ratio(series, best)}  {best}")
        rest = [name for name in (BARE, *peers) if name in series and name != best]
        lines += [f"loader / {name:14s} {ratio(series, name)}" for name in rest]
    for name, one in series.items():
        cpu_us = statistics.median(one.cpu_us)
        lines.append(f"{name:16s} {rates[name]:7,.0f} patches/s, {cpu_us:6,.0f} µs of CPU a patch")
    return lines


def ratio(series: dict[str, Series], name: str) -> str:
    """How often the loader's rate holds another's: by the clock, and by CPU time, which drifts less."""
    ours, theirs = series[LOADER], series[name]
    cpu = [b / a for a, b in zip(ours.cpu_us, theirs.cpu_us, strict=True)]
    return f"{paired(ours.rates, theirs.rates)}; by CPU time {statistics.median(cpu):.2f} x"


def against_itself(subject: Subject, blocks: int) -> list[str]:
    """Four patches a read beside one."""
    lines = ["  patches_per_read, exact"]
    with (
        PatchLoader(subject.sampler(1), BLOCK, threads=1, prefetch=1) as one,
        PatchLoader(subject.sampler(1, patches_per_read=4), BLOCK, threads=1, prefetch=1) as four,
    ):
        works = {"1 a read": lambda k: take(one), "4 a read": lambda k: take(four)}
        series = in_turns(works, blocks)
    lines.append(
        f"    4 / 1                   {paired(series['4 a read'].rates, series['1 a read'].rates)}"
    )
    for name, found in series.items():
        lines.append(f"    {name:16s} {statistics.median(found.rates):7,.0f} patches/s")
    return lines


if __name__ == "__main__":
    main()
