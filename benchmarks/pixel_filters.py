"""How many patches the pixel filters keep on real slides, how sharp patches are, and what asking costs.

    python benchmarks/pixel_filters.py SLIDE[=MPP] ... [--out FILE]

200 patches of 224 px on tissue at 1 and 2 times each slide's own µm/px. `hsv` is the share that
HsvFilter() keeps. Sharpness is the variance of the Laplacian of grey: its 1st, 10th and 50th percentile
as scanned, and its median after a Gaussian blur of 1, 2 and 4 px: a patch out of focus. `blur` is the
share BlurFilter() keeps, as scanned and after each blur.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import about_this_run, tissue, write_out
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from online_patching import PatchLoader, PatchSampler, Slide, read_slide_index
from online_patching.sampling.filters import BlurFilter, HsvFilter, PixelFilter, sharpness

SIZE_PX, PATCHES, SIGMAS = 224, 200, (1.0, 2.0, 4.0)


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    hsv, blur = HsvFilter(), BlurFilter()
    lines = [
        about_this_run(),
        f"HsvFilter(min_share={hsv.min_share:g}), BlurFilter(min_variance={blur.min_variance:g})",
        "",
        f"{'':32}{'µm/px':>7}{'hsv':>7}{'1 %':>8}{'10 %':>7}{'50 %':>7}"
        + "".join(f"{f'blur {s:g}':>8}" for s in SIGMAS)
        + f"{'kept':>8}" + "".join(f"{f'at {s:g}':>7}" for s in SIGMAS),
    ]  # fmt: skip
    for given in args.slides:
        path, _, own = given.partition("=")
        index = read_slide_index(path, mpp=float(own) if own else None)
        with Slide(index) as slide:
            mask = tissue(slide)
        for times in (1.0, 2.0):
            sampler = PatchSampler([index], [mask], size_px=SIZE_PX, mpp=times * index.mpp, seed=1)
            with PatchLoader(sampler, PATCHES) as loader:
                pixels = next(loader).pixels
            lines.append(
                f"{index.slide_id[:31]:32}{times * index.mpp:7.2f}" + row(pixels, hsv, blur)
            )
    lines += ["", f"a patch: {name_us(hsv, pixels)}, {name_us(blur, pixels)}"]
    write_out(lines, args.out)


def row(pixels: NDArray[np.uint8], hsv: HsvFilter, blur: BlurFilter) -> str:
    """One line of the table."""
    softer = [pixels] + [
        np.stack([gaussian_filter(p, (sigma, sigma, 0)) for p in pixels]) for sigma in SIGMAS
    ]
    sharp = [np.asarray([sharpness(patch) for patch in some]) for some in softer]
    low, tenth, middle = np.percentile(sharp[0], [1, 10, 50])
    return (
        f"{hsv.keep(pixels).mean():7.2f}{low:8.0f}{tenth:7.0f}{middle:7.0f}"
        + "".join(f"{np.median(some):8.1f}" for some in sharp[1:])
        + f"{blur.keep(pixels).mean():8.2f}"
        + "".join(f"{blur.keep(some).mean():7.2f}" for some in softer[1:])
    )


def name_us(one: PixelFilter, pixels: NDArray[np.uint8]) -> str:
    """Microseconds a patch, the best of five goes."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        one.keep(pixels)
        seconds.append(time.perf_counter() - began)
    return f"{one.name} {min(seconds) / len(pixels) * 1e6:.0f} µs"


if __name__ == "__main__":
    main()
