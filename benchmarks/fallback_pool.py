"""How much several region workers are worth: 224 px patches of a fallback slide, asked for by as many threads.

    python benchmarks/fallback_pool.py SLIDE[=MPP] [--blocks 7] [--out benchmarks/results/FILE.txt]

SLIDE's tissue becomes a Hamamatsu VMS, which only OpenSlide opens. The same patches go through pools of 1, 2 and 4
processes, in blocks that take turns; four threads ask. All cores are used: rates are by the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import about_this_run, in_turns, paired, write_out

from online_patching import SlideIndex, open_slide, read_slide_index
from online_patching.formats.region_pool import RegionPool
from online_patching.geometry import Box
from online_patching.testing.ndpi import write_vms

_SIDE_PX, _PATCHES, _THREADS = 4096, 64, 4
_POOLS = (1, 2, 4)


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = [about_this_run(), f"{os.cpu_count()} cores, {_THREADS} threads", ""]
    with tempfile.TemporaryDirectory() as folder:
        index = made(args.slide, Path(folder))
        lines += measured(index, args.blocks)
    write_out(lines, args.out)


def made(slide: str, folder: Path) -> SlideIndex:
    """The index of a VMS of the middle of a slide."""
    name, _, mpp = slide.partition("=")
    with open_slide(name, mpp=float(mpp) if mpp else None) as source:
        left, top = ((n - _SIDE_PX) // 2 for n in source.dimensions)
        tissue = source.read_box(0, Box(left, top, left + _SIDE_PX, top + _SIDE_PX))
        path = write_vms(folder, tissue, source.mpp, interval_mcus=64)
    return read_slide_index(str(path))


def measured(index: SlideIndex, blocks: int) -> list[str]:
    """Ratios first, then rates."""
    places = np.random.default_rng(1).integers(0, _SIDE_PX - 224, (blocks + 1, _PATCHES, 2))
    pools = {most: RegionPool(most) for most in _POOLS}

    def read(most: int, block: int) -> list[int]:
        def one(place: list[int]) -> int:
            box = Box(place[0], place[1], place[0] + 224, place[1] + 224)
            return pools[most].read(index, 0, box).size

        return list(threads.map(one, places[block].tolist()))

    with ThreadPoolExecutor(_THREADS) as threads:
        works = {f"{most} processes": lambda block, most=most: read(most, block) for most in _POOLS}
        series = in_turns(works, blocks)
    for pool in pools.values():
        pool.close()
    rates = {name: one.rates for name, one in series.items()}
    alone = rates["1 processes"]
    lines = [
        f"{name} / 1: {paired(found, alone)}" for name, found in rates.items() if found is not alone
    ]
    return lines + [
        f"{name}: {statistics.median(found):6,.0f} patches/s" for name, found in rates.items()
    ]


if __name__ == "__main__":
    main()
