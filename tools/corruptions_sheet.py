"""Draws a patch of a slide under every corruption and severity: docs/pictures/corruptions.jpg.

    python tools/corruptions_sheet.py SLIDE --out docs/pictures/corruptions.jpg [--at-um X Y] [--mpp 0.5]

One row a corruption, the patch as it is on the left, then severities 1 to 5; 224 px patches, drawn at 128 px.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from online_patching import open_slide
from pathfm.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pathfm.pictures import mosaic

PATCH_PX = 224


def main() -> None:
    """Read one patch, corrupt it in every way, write the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-um", type=float, nargs=2, default=(520.0, 340.0), metavar=("X", "Y"))
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument(
        "--picture", type=int, default=0, help="number that the strokes are drawn by"
    )
    args = parser.parse_args()
    with open_slide(args.slide) as slide:
        x_um, y_um = args.at_um
        patch = slide.read_patch(x_um=x_um, y_um=y_um, mpp=args.mpp, size_px=PATCH_PX)
    pictures, captions = [], []
    for name, kind in CORRUPTIONS.items():
        pictures.append(patch)
        captions.append(name)
        for severity in SEVERITIES:
            pictures.append(corrupt(patch[None], name, severity, np.array([args.picture]))[0])
            captions.append(f"{severity}: {_told(kind.levels[severity - 1])}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    mosaic(pictures, captions, columns=1 + len(SEVERITIES)).save(args.out, quality=78)


def _told(level: object) -> str:
    """A level in few characters: 0.05, or 10, 3."""
    return ", ".join(map(str, level)) if isinstance(level, tuple) else str(level)


if __name__ == "__main__":
    main()
