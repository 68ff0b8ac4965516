"""What a draw costs, by kind of sampler, and what making a sampler of very many slides costs.

    python benchmarks/draw_cost.py [--slides N] [--out FILE]

Twenty slides of 20 x 15 mm at 0.25 µm/px, masks of round pieces of tissue at 8 µm, in memory. Best of 40
batches of 256 draws of 224 px, columns only; `tries` are positions looked at a draw. Then the same
records repeated to N slides: seconds to make a sampler, MB it keeps, MB at the most meanwhile.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import about_this_run, write_out

from online_patching import Corpus, ForegroundMask, PatchSampler, SlideIndex
from online_patching.sampling.draws import Sampler
from online_patching.sampling.grid import EpochSampler, GridSampler
from online_patching.sampling.magnification import Continuous, MaxAvg, MinMax
from online_patching.sampling.weights import area_weights
from online_patching.slide_index import Codec, Level

BATCH, BATCHES, SIZE_PX, SLIDES = 256, 40, 224, 20
KINDS: dict[str, dict[str, Any]] = {
    "0.5 µm/px": {"mpp": 0.5},
    "list of four": {},
    "uniform": {"mpp": Continuous(0.25, 2.0)},
    "log": {"mpp": Continuous(0.25, 2.0, "log")},
    "MaxAvg": {"mpp": MaxAvg(0.25, 2.0)},
    "MinMax": {"mpp": MinMax(0.25, 2.0)},
    "90 % tissue": {"min_foreground": 0.9},
    "four a read": {"patches_per_read": 4},
    "few a slide": {"patches_per_slide": 100},
}


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slides", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    corpus = few_slides()
    lines = [about_this_run(), "", f"{'':16}{'µs a draw':>10}{'tries':>8}"]
    grid = GridSampler(corpus, size_px=SIZE_PX, mpp=0.5)
    samplers: dict[str, Sampler] = {
        name: PatchSampler(corpus, size_px=SIZE_PX, **options) for name, options in KINDS.items()
    }
    samplers |= {f"grid of {len(grid):,}": grid, "its epochs": EpochSampler(grid)}
    lines += [f"{name:16}{cost(sampler, BATCH)}" for name, sampler in samplers.items()]
    lines += [f"{'one by one':16}{cost(samplers['0.5 µm/px'], 1)}", ""]
    began = time.perf_counter()
    GridSampler(corpus, size_px=SIZE_PX, mpp=0.5)
    places = len(GridSampler(corpus, size_px=SIZE_PX, mpp=0.5, min_foreground=0))
    lines.append(f"making that grid: {(time.perf_counter() - began) / places * 1e6:.1f} µs a place")
    lines += [
        "",
        f"{args.slides:,} slides{'ms':>12}{'keeps MB':>10}{'at most':>9}{'µs a draw':>11}",
    ]
    many = Corpus(
        corpus._packed._replace(slides=np.resize(corpus.records, args.slides)), corpus.digest
    )
    made: dict[str, Callable[[], PatchSampler]] = {
        name: partial(PatchSampler, many, size_px=SIZE_PX, **KINDS[name])
        for name in ("list of four", "uniform", "MinMax")
    }
    made["by area"] = lambda: PatchSampler(many, size_px=SIZE_PX, slide_weights=area_weights(many))
    lines += [f"{name:16}{making(make)}" for name, make in made.items()]
    write_out(lines, args.out)


def few_slides() -> Corpus:
    """Slides whose masks are some discs of tissue."""
    rng, slides, masks = np.random.default_rng(0), [], []
    y, x = np.mgrid[:1875, :2500]
    for i in range(SLIDES):
        levels = tuple(
            Level(80_000 // d, 60_000 // d, 256, 256, d, d, d / 4, d / 4, Codec("jpeg")) for d in (1, 4, 16)
        )  # fmt: skip
        slides.append(SlideIndex(f"s{i}", f"/s{i}", "tiff", "none", 0.25, 0.25, "given", levels))
        tissue = np.zeros(y.shape, bool)
        for _ in range(6):
            cy, cx, r = rng.uniform(0, 1875), rng.uniform(0, 2500), rng.uniform(190, 470)
            tissue |= (y - cy) ** 2 + (x - cx) ** 2 < r * r
        masks.append(ForegroundMask.from_array(tissue, (80_000, 60_000), (0.25, 0.25)))
    return Corpus.from_slides(slides, masks)


def cost(sampler: Sampler, n: int) -> str:
    """Microseconds a draw in batches of `n`, and tries a draw."""
    seconds, tries = [], 0
    for k in range(BATCHES):
        began = time.perf_counter()
        draws = sampler.draw_batch(np.arange(k * n, (k + 1) * n))
        seconds.append(time.perf_counter() - began)
        tries += int(draws.tries.sum())
    return f"{min(seconds) / n * 1e6:10.1f}{tries / n / BATCHES:8.2f}"


def making(make: Callable[[], PatchSampler]) -> str:
    """Milliseconds to make a sampler, what it keeps and held at most, and a draw's cost."""
    tracemalloc.start()
    make()
    began = tracemalloc.get_traced_memory()[0]
    sampler = make()
    kept, most = (b - began for b in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        make()
        seconds.append(time.perf_counter() - start)
    return f"{min(seconds) * 1e3:9.0f}{kept / 1e6:10.1f}{most / 1e6:9.1f}{cost(sampler, BATCH)[:10]:>11}"


if __name__ == "__main__":
    main()
