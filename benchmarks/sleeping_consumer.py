"""A consumer that only sleeps: how long it waits for patches at a given pace, and the cores that takes.

    python benchmarks/sleeping_consumer.py SLIDE[=MPP] ... [--rates 500 1000 2000] [--seconds 15]
        [--batch 256] [--out benchmarks/results/FILE.txt]

Each step takes a batch and sleeps as long as a device would compute at that many patches a second.
Wait share: time spent in next_batch() over all time, after a second to fill up. CPU is that of the
process and its loader processes; at a pace they cannot keep, the rate reached says where the limit is.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import psutil
from common import about_this_run, tissue, write_out

from online_patching import PatchLoader, PatchSampler, Slide, read_slide_index

SIZE_PX = 224
ENGINES = {"threads": (0, 2), "processes": (2, 1)}
"""Workers, and decode threads each."""


def main() -> None:
    """Run every engine at every pace, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--rates", type=int, nargs="*", default=[500, 1000, 2000])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    sampler, mpp = opened(args.slides)
    lines = [
        about_this_run("pillow", "numpy"),
        (
            f"{', '.join(Path(s.partition('=')[0]).name for s in args.slides)}: {SIZE_PX} px at "
            f"{mpp:g} µm/px, batches of {args.batch}, {len(os.sched_getaffinity(0))} cores"
        ),
        "",
        f"{'engine':12s}{'asked /s':>10s}{'got /s':>10s}{'wait':>9s}{'cores used':>12s}{'CPU µs/patch':>14s}",
    ]
    for name, engine in ENGINES.items():
        for rate in args.rates:
            lines.append(f"{name:12s}" + paced(sampler, engine, rate, args.batch, args.seconds))
            print(lines[-1], flush=True)
    write_out(lines, args.out)


def opened(slides: list[str]) -> tuple[PatchSampler, float]:
    """A sampler over slides at the first one's level-0 µm/px, and that."""
    indexes, masks = [], []
    for given in slides:
        path, _, um = given.partition("=")
        index = read_slide_index(path, mpp=float(um) if um else None)
        with Slide(index) as slide:
            masks.append(tissue(slide))
        indexes.append(index)
    mpp = indexes[0].mpp
    return PatchSampler(indexes, masks, size_px=SIZE_PX, mpp=mpp, seed=1), mpp


def paced(
    sampler: PatchSampler, engine: tuple[int, int], rate: int, batch: int, seconds: float
) -> str:
    """One line of the table."""
    sleep_s = batch / rate
    with PatchLoader(sampler, batch, workers=engine[0], threads=engine[1], copy=False) as loader:
        filled = time.perf_counter() + 1
        while time.perf_counter() < filled:
            step(loader, sleep_s)
        waits, cpu_s, began = [], cpu_seconds(), time.perf_counter()
        while time.perf_counter() - began < seconds:
            waits.append(step(loader, sleep_s))
        took, cpu_s = time.perf_counter() - began, cpu_seconds() - cpu_s
    patches = batch * len(waits)
    return (
        f"{rate:10,d}{patches / took:10,.0f}{sum(waits) / took:9.2%}{cpu_s / took:12.2f}"
        f"{cpu_s / patches * 1e6:14,.0f}"
    )


def step(loader: PatchLoader, sleep_s: float) -> float:
    """Take a batch, give it back, sleep; how long the taking took."""
    began = time.perf_counter()
    batch = loader.next_batch()
    waited = time.perf_counter() - began
    batch.release()
    time.sleep(sleep_s)
    return waited


def cpu_seconds() -> float:
    """What this process and its children have used until now."""
    me = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])


if __name__ == "__main__":
    main()
