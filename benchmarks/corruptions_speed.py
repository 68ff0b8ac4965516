"""Time a patch takes through each corruption, beside `imagecorruptions` where both define it alike.

    python benchmarks/corruptions_speed.py [--patches 32] [--blocks 7] [--core -1] [--out FILE]

224 px patches, severity 3, one thread on one core; peers take turns block by block. The peer's brightness has
other levels than ours, which changes nothing about its time. Patches are smooth random colours.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from common import Work, about_this_run, in_turns, last_core, paired, pin, write_out
from imagecorruptions import corrupt as corrupt_theirs
from numpy.typing import NDArray
from PIL import Image

from pathfm.corruptions import CORRUPTIONS, corrupt

SIDE_PX, SEVERITY = 224, 3
PEERS = {
    "jpeg": "jpeg_compression",
    "pixelate": "pixelate",
    "defocus": "defocus_blur",
    "motion": "motion_blur",
    "brightness": "brightness",
    "saturation": "saturate",
}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--patches", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--core", type=int, default=-1, help="core to run on; -1: the last")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pin(last_core() if args.core < 0 else args.core)
    cv2.setNumThreads(1)
    patches = some_patches(args.patches)
    lines = [
        about_this_run("imagecorruptions-imaug", "numpy", "scipy", "pillow", "opencv-python"),
        "",
        f"one thread on one core, {args.patches} patches of {SIDE_PX} px a block, {args.blocks} blocks",
        "",
        f"{'':12}{'ours, ms of CPU':>16}{'imagecorruptions':>18}   how many times as fast ours is, by the clock",
    ]
    for name in CORRUPTIONS:
        works: dict[str, Work] = {"ours": ours(patches, name)}
        if name in PEERS:
            works["theirs"] = theirs(patches, PEERS[name])
        series = in_turns(works, args.blocks)
        told = f"{name:12}{np.median(series['ours'].cpu_us) / 1e3:16.2f}"
        if "theirs" in series:
            ratio = paired(series["ours"].rates, series["theirs"].rates)
            told += f"{np.median(series['theirs'].cpu_us) / 1e3:18.2f}   {ratio}"
        lines.append(told)
    write_out(lines, args.out)


def some_patches(n: int) -> NDArray[np.uint8]:
    """(n, side, side, 3), smooth random colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 28, 28, 3), np.uint8)
    size = (SIDE_PX, SIDE_PX)
    return np.stack(
        [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in coarse]
    )


def ours(patches: NDArray[np.uint8], name: str) -> Callable[[int], NDArray[np.uint8]]:
    """Our batch of one block."""
    return lambda block: corrupt(patches, name, SEVERITY, np.arange(len(patches)), seed=block)


def theirs(patches: NDArray[np.uint8], name: str) -> Callable[[int], list[NDArray[np.uint8]]]:
    """The peer's, one patch at a time, which is how it works."""
    return lambda _: [
        corrupt_theirs(patch, severity=SEVERITY, corruption_name=name) for patch in patches
    ]


if __name__ == "__main__":
    main()
