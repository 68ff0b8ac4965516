"""Draws the sheet of synthetic thumbnails in the docs, each beside its kinds.

    python tools/synthetic_sheet.py --out docs/pictures/synthetic_thumbnails.jpg --first 300

Colours: glass white, tissue purple, fat and alveoli yellow, pale and loose tissue pink, pen green,
bubbles blue, coverslip edges black, dust brown, frames grey.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from online_patching.stores.local import atomic_write_bytes
from pathfm.pictures import jpeg_bytes
from pathfm.segmentation.synthetic import draw_thumbnail

COLOURS = np.array(
    [(255, 255, 255), (170, 60, 120), (250, 200, 60), (240, 160, 200), (0, 120, 60),
     (60, 140, 240), (30, 30, 30), (130, 90, 40), (200, 200, 200)], np.uint8
)  # fmt: skip


def sheet(
    seed: int, first: int, columns: int = 4, rows: int = 6, side_px: int = 192
) -> Image.Image:
    """Thumbnails `first`, `first` + 1, ... of a seed in rows, drawn at twice `side_px`."""
    gap = 6
    made = Image.new("RGB", (columns * (2 * side_px + gap), rows * (side_px + gap)), (90, 90, 90))
    for k in range(columns * rows):
        drawn = draw_thumbnail(seed, first + k, 2 * side_px)
        x, y = k % columns * (2 * side_px + gap), k // columns * (side_px + gap)
        size = (side_px, side_px)
        made.paste(Image.fromarray(drawn.rgb).resize(size, Image.Resampling.LANCZOS), (x, y))
        kinds = Image.fromarray(COLOURS[drawn.kinds]).resize(size, Image.Resampling.BOX)
        made.paste(kinds, (x + side_px, y))
    return made


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first thumbnail")
    given = parser.parse_args()
    atomic_write_bytes(given.out, jpeg_bytes(sheet(given.seed, given.first), quality=72))


if __name__ == "__main__":
    main()
