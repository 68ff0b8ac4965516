"""Writes the drawn tissue masks as a folder of images/ and masks/, which `pathfm probe-segmentation` reads.

    python tools/drawn_masks.py --pictures ../shared/data/masks ../shared/data/wsi PICTURES --out drawn

PICTURES holds those of `pathfm/segmentation/drawn/pictures.csv` that come from elsewhere (its column origin).
training, validation and evaluation become train, val and test; slides or cases are groups. Classes: glass (0),
tissue (1: what was drawn, without what lies under pen), and 255 for pixels that cannot be decided.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.runtime import PathfmError
from pathfm.segmentation.truth import DRAWN, DrawnPicture, read_pictures

SPLITS = {"training": "train", "validation": "val", "evaluation": "test"}
CLASSES = "number,name,ignored\n0,glass,no\n1,tissue,no\n255,undecided,yes\n"
IGNORED = 255


def numbers_of(picture: DrawnPicture) -> NDArray[np.uint8]:
    """0 glass, 1 tissue, 255 undecided, uint8 (h, w)."""
    numbers = picture.tissue.astype(np.uint8)
    numbers[picture.ignore] = IGNORED
    return numbers


def write_folder(pictures: Sequence[DrawnPicture], out: Path, least_px: int = 0) -> str:
    """Writes the folder; a line about it. least_px: pictures with a shorter side are left out, and told.

    Raises PathfmError where the folder is there already.
    """
    if out.exists():
        raise PathfmError(f"{out} is there already: remove it, or write another folder")
    rows = [("path", "group")]
    small = [p.name for p in pictures if min(p.rgb.shape[:2]) < least_px]
    taken = [p for p in pictures if p.name not in small]
    for picture in taken:
        split = SPLITS[picture.split]
        path = f"{split}/images/{picture.name}.png"
        _write(out / path, picture.rgb)
        _write(out / split / "masks" / f"{picture.name}.png", numbers_of(picture))
        rows.append((path, picture.case))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write_text(out / "groups.csv", text.getvalue())
    atomic_write_text(out / "classes.csv", CLASSES)
    cases = len({picture.case for picture in taken})
    left = f"; left out as smaller than {least_px} px: {', '.join(small)}" if small else ""
    return f"{out}: {len(taken)} pictures of {cases} slides or cases{left}"


def _write(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    atomic_write_bytes(path, held.getvalue())


def main() -> None:
    """Reads the arguments, writes the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pictures", type=Path, nargs="+", required=True, help="where pictures lie"
    )
    parser.add_argument("--drawn", type=Path, default=DRAWN, help="pictures.csv and the drawings")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--least_px", type=int, default=0, help="leave out pictures with a shorter side"
    )
    given = parser.parse_args()
    try:
        pictures = read_pictures(given.pictures, drawn=given.drawn)
        print(write_folder(pictures, given.out, given.least_px))
    except PathfmError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
