"""Larger slides out of real pixels, by mirroring: what public data hardly has, and benchmarks need.

    python benchmarks/larger_slides.py SLIDE FOLDER [--mpp MPP] [--side 20480] [--rgb]

One level, 256 px JPEG tiles at quality 80: 4:2:0 YCbCr, or 4:4:4 RGB as some scanners store it.
Nothing is scaled: the source's level 0 is read and reflected at its edges until `--side` is reached.
The source's licence stays with the result: keep it out of the repository.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from online_patching import Slide, read_slide_index
from online_patching.geometry import Box

TILE_PX, QUALITY = 256, 80


def main() -> None:
    """Write one slide and say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, where the file carries none")
    parser.add_argument("--side", type=int, default=20_480)
    parser.add_argument("--rgb", action="store_true")
    args = parser.parse_args()
    print(larger(args.slide, args.folder, mpp=args.mpp, side_px=args.side, rgb=args.rgb))


def larger(
    source: Path,
    folder: Path,
    *,
    mpp: float | None = None,
    side_px: int = 20_480,
    rgb: bool = False,
) -> Path:
    """The larger slide's path; what an earlier call wrote is used again."""
    path = folder / f"{source.stem}_{side_px}_{'rgb' if rgb else 'ycbcr'}.tif"
    if path.exists():
        return path
    index = read_slide_index(str(source), mpp=mpp)
    with Slide(index) as slide:
        pixels = slide.read_box(0, Box(0, 0, *slide.dimensions))
    part = path.with_suffix(".part")
    tifffile.imwrite(
        part, reflected(pixels, side_px), shape=(side_px, side_px, 3), dtype=np.uint8, bigtiff=False,
        tile=(TILE_PX, TILE_PX), photometric="rgb", compression="jpeg",
        compressionargs={"level": QUALITY, "outcolorspace": "rgb" if rgb else "ycbcr"},
        subsampling=(1, 1) if rgb else (2, 2),
        resolution=(1e4 / index.mpp, 1e4 / index.mpp), resolutionunit="CENTIMETER", metadata=None,
        maxworkers=1,
    )  # fmt: skip
    return part.rename(path)


def reflected(pixels: NDArray[np.uint8], side_px: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles of the picture, reflected at its edges, row by row."""

    def places(n: int) -> NDArray[np.int64]:
        """Where each pixel comes from: 0 .. n-1, n-1 .. 0, 0 .. n-1, ..."""
        there = np.arange(side_px) % (2 * n)
        return np.minimum(there, 2 * n - 1 - there)

    rows, columns = places(pixels.shape[0] - 44), places(pixels.shape[1] - 44)  # tiles out of step
    for top in range(0, side_px, TILE_PX):
        strip = pixels[rows[top : top + TILE_PX]][:, columns]
        for left in range(0, side_px, TILE_PX):
            yield np.ascontiguousarray(strip[:, left : left + TILE_PX])


if __name__ == "__main__":
    main()
