"""Writes the drawn thumbnails as a folder of pictures and masks, for `pathfm probe-segmentation`.

    python tools/drawn_masks.py --pictures ../shared/data/masks --out drawn --without helicobacter kidney
    pathfm probe-segmentation --data drawn --weights imagenet random --tile_px 0

Only pictures that are there are taken, and none whose name holds a word of `--without`: slides that a backbone
was pretrained on, or templates of pens and coverslip edges, which are no slides.
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

CLASSES = ((0, "background", ""), (1, "tissue", ""), (2, "undecided", "yes"))


def pictures_at_hand(root: Path, without: Sequence[str]) -> list[DrawnPicture]:
    """The drawn pictures under `root` whose names hold none of the words of `without`."""
    rows = [
        row
        for row in read_table(DRAWN / "pictures.csv")
        if (root / row["file"]).is_file() and not any(word in row["name"] for word in without)
    ]
    if not rows:
        raise PathfmError(f"none of the drawn pictures is under {root}")
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder)
        write_csv(some / "pictures.csv", COLUMNS, [[row[c] for c in COLUMNS] for row in rows])
        for row in rows:
            shutil.copy(DRAWN / f"{row['name']}.geojson", some)
        return read_pictures([root], drawn=some)


def write_folder(pictures: Sequence[DrawnPicture], out: Path) -> None:
    """`images/` and `masks/` of the same names, `classes.csv`, and `groups.csv` by case."""
    for part in ("images", "masks"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        mask = np.where(picture.ignore, 2, picture.tissue.astype(np.uint8)).astype(np.uint8)
        Image.fromarray(picture.rgb).save(out / "images" / f"{picture.name}.png")
        Image.fromarray(mask).save(out / "masks" / f"{picture.name}.png")
    write_csv(out / "classes.csv", ("number", "name", "ignored"), CLASSES)
    groups = [(f"images/{picture.name}.png", picture.case) for picture in pictures]
    write_csv(out / "groups.csv", ("path", "group"), groups)


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="folder the pictures are in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", nargs="*", default=(), help="words of names left out")
    given = parser.parse_args()
    try:
        pictures = pictures_at_hand(given.pictures, given.without)
        write_folder(pictures, given.out)
    except PathfmError as error:
        parser.error(str(error))
    share = np.mean([picture.tissue.mean() for picture in pictures])
    print(
        f"{len(pictures)} pictures of {len({p.case for p in pictures})} cases, {share:.0%} tissue"
    )


if __name__ == "__main__":
    main()
