"""Two facts about the reader that the docs quote: how exact a resampled patch is, what a draw costs.

    python benchmarks/reader_facts.py SLIDE[=MPP] ... [--out benchmarks/results/FILE.txt]

Exactness: patches at several multiples of level 0's µm/px against the exact area average of the
same window in float64; the mean over patches of their mean difference, and the largest of any
sample, in grey levels. Cost: a whole draw (slide, µm/px, position, mask test, PatchRef), and its
random words alone, on an all-tissue mask of the first slide.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import about_this_run
from numpy.typing import NDArray

from online_patching import ForegroundMask, PatchSampler, Slide, read_slide_index
from online_patching.geometry import Box
from online_patching.philox import words
from online_patching.plan import plan_square

SIZE_PX, PATCHES, DRAWS = 112, 12, 2000
TIMES = (0.6, 1.03, 1.37, 1.9, 2.0, 3.3)  # all read from level 0


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = [about_this_run(), "", "grey levels from an exact area average: mean, largest"]
    lines.append(f"{'times level 0':40s}" + "".join(f"{t:>14g}" for t in TIMES))
    for given in args.slides:
        path, _, mpp = given.partition("=")
        index = read_slide_index(path, mpp=float(mpp) if mpp else None)
        with Slide(index) as slide:
            cells = [error(slide, times) for times in TIMES]
        lines.append(f"{index.slide_id[:38]:40s}" + "".join(f"{m:8.2f}{w:6.1f}" for m, w in cells))
    path, _, mpp = args.slides[0].partition("=")
    index = read_slide_index(path, mpp=float(mpp) if mpp else None)
    lines += ["", *draw_cost(PatchSampler([index], [ForegroundMask.everything(index)]))]
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def error(slide: Slide, times: float) -> tuple[float, float]:
    """Mean and largest difference over PATCHES random places in the slide's middle."""
    index, rng = slide.index, np.random.default_rng(1)
    means, largest = [], 0.0
    for _ in range(PATCHES):
        x, y = (rng.uniform(0.2, 0.6) * side for side in slide.dimensions)
        side = SIZE_PX * times
        patch = slide.read_patch(
            x_um=x * index.mpp_x, y_um=y * index.mpp_y, mpp=index.mpp * times, size_px=SIZE_PX
        )
        plan = plan_square(index, index.mpp * times, (x, y), (side, side), SIZE_PX)
        if (
            plan.window is None
        ):  # not resampled: the corner is rounded to a pixel of what is decoded
            x, y = plan.box.left * plan.scale, plan.box.top * plan.scale
        left, top, stop = int(x), int(y), int(side) + 3
        around = slide.read_box(0, Box(left, top, left + stop, top + stop))
        window = (x - left, y - top, x - left + side, y - top + side)
        off = np.abs(patch - area_average(around, window))
        means.append(float(off.mean()))
        largest = max(largest, float(off.max()))
    return float(np.mean(means)), largest


def area_average(
    pixels: NDArray[np.uint8], window: tuple[float, float, float, float]
) -> NDArray[np.float64]:
    """The exact mean over each output pixel's footprint."""

    def weights(low: float, high: float, n: int) -> NDArray[np.float64]:
        edges, cells = np.linspace(low, high, SIZE_PX + 1), np.arange(n)
        upper, lower = np.minimum(edges[1:, None], cells + 1), np.maximum(edges[:-1, None], cells)
        return np.asarray(np.clip(upper - lower, 0, None) / np.diff(edges)[:, None])

    left, top, right, bottom = window
    wy, wx = weights(top, bottom, pixels.shape[0]), weights(left, right, pixels.shape[1])
    return np.asarray(np.einsum("yr,rcd,xc->yxd", wy, pixels.astype(np.float64), wx, optimize=True))


def draw_cost(sampler: PatchSampler) -> list[str]:
    """Microseconds a draw, best of five batches."""
    whole, random = [], []
    for k in range(5):
        numbers = np.arange(k * DRAWS, (k + 1) * DRAWS)
        began = time.perf_counter()
        sampler.refs(sampler.draw_batch(numbers))
        middle = time.perf_counter()
        words(0, numbers, 0, 0, 3), words(0, numbers, 0, 16, 3)
        whole.append(middle - began)
        random.append(time.perf_counter() - middle)
    return [
        (
            f"a draw: {min(whole) / DRAWS * 1e6:.1f} µs, its random words {min(random) / DRAWS * 1e6:.2f} µs "
            f"(batches of {DRAWS:,})"
        )
    ]


if __name__ == "__main__":
    main()
