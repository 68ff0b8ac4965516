"""Writes the drawn thumbnails as a folder of pictures and masks, for `pathfm probe-segmentation`.

    python tools/drawn_masks.py --pictures ../shared/data/masks --out drawn --without helicobacter kidney
    pathfm probe-segmentation --data drawn --weights imagenet random --tile_px 0

Only pictures that are there are taken, and none whose name holds a word of `--without`: slides that a backbone
was pretrained on, or templates of pens and coverslip edges, which are no slides. With `--splits` training,
validation and evaluation become train, val and test; `--least_px` leaves out what holds no tile of that side.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pathfm.cohorts import write_csv
from pathfm.runtime import PathfmError
from pathfm.segmentation.truth import COLUMNS, DRAWN, DrawnPicture, read_pictures, read_table

SPLITS = {"training": "train/", "validation": "val/", "evaluation": "test/"}
CLASSES = ((0, "background", ""), (1, "tissue", ""), (2, "undecided", "yes"))


def pictures_at_hand(roots: Sequence[Path], without: Sequence[str]) -> list[DrawnPicture]:
    """The drawn pictures under any of the roots whose names hold none of the words of `without`."""
    rows = [
        row
        for row in read_table(DRAWN / "pictures.csv")
        if any((root / row["file"]).is_file() for root in roots)
        and not any(word in row["name"] for word in without)
    ]
    if not rows:
        raise PathfmError(f"none of the drawn pictures is under {', '.join(map(str, roots))}")
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder)
        write_csv(some / "pictures.csv", COLUMNS, [[row[c] for c in COLUMNS] for row in rows])
        for row in rows:
            shutil.copy(DRAWN / f"{row['name']}.geojson", some)
        return read_pictures(roots, drawn=some)


def write_folder(pictures: Sequence[DrawnPicture], out: Path, splits: bool = False) -> None:
    """`images/` and `masks/` of the same names, `classes.csv`, and `groups.csv` by case.

    splits: under train, val and test, as the drawings were shared out.
    """
    groups = []
    for picture in pictures:
        split = SPLITS[picture.split] if splits else ""
        mask = np.where(picture.ignore, 2, picture.tissue.astype(np.uint8)).astype(np.uint8)
        for part, pixels in (("images", picture.rgb), ("masks", mask)):
            (out / split / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(out / split / part / f"{picture.name}.png")
        groups.append((f"{split}images/{picture.name}.png", picture.case))
    write_csv(out / "classes.csv", ("number", "name", "ignored"), CLASSES)
    write_csv(out / "groups.csv", ("path", "group"), groups)


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="where they are")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", nargs="*", default=(), help="words of names left out")
    parser.add_argument("--splits", action="store_true", help="train, val and test as drawn for")
    parser.add_argument("--least_px", type=int, default=0, help="shortest side of what is taken")
    given = parser.parse_args()
    try:
        found = pictures_at_hand(given.pictures, given.without)
        pictures = [p for p in found if min(p.rgb.shape[:2]) >= given.least_px]
        write_folder(pictures, given.out, given.splits)
    except PathfmError as error:
        parser.error(str(error))
    share = np.mean([picture.tissue.mean() for picture in pictures])
    small = f", {len(found) - len(pictures)} smaller left out" if given.least_px else ""
    cases = len({p.case for p in pictures})
    print(f"{len(pictures)} pictures of {cases} cases, {share:.0%} tissue{small}")


if __name__ == "__main__":
    main()
