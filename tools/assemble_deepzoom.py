"""Puts together one level of a Deep Zoom slide kept in a git repository, as one picture.

Deep Zoom keeps level N as tiles ``<slide>_files/N/<column>_<row>.jpeg`` beside ``<slide>.dzi``, which
tells the tiles' side, how many pixels neighbours share on each side, and the full size; each level
below halves that size, rounding up.

    python tools/assemble_deepzoom.py REPOSITORY.git HE 11 --out picture.jpg

Source: Microsoft, "Deep Zoom File Format Overview" (the DZI schema of 2008).
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
from pathlib import Path

from PIL import Image


def blob(repository: Path, name: str) -> bytes:
    """The bytes of a file at HEAD; SystemExit naming it when the repository has none such."""
    command = ["git", "-C", str(repository), "cat-file", "blob", f"HEAD:{name}"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{repository}: no file {name!r} at HEAD: see git ls-tree -r HEAD")
    return done.stdout


def number(dzi: str, attribute: str) -> int:
    """An attribute of the .dzi, as a whole number; SystemExit when it is missing."""
    found = re.search(rf'\b{attribute}="(\d+)"', dzi)
    if found is None:
        raise SystemExit(f"the .dzi has no {attribute}: not a Deep Zoom file")
    return int(found[1])


def assemble(repository: Path, slide: str, level: int) -> Image.Image:
    """The level's whole picture, RGB; level 0 is one pixel, the top level the full slide.

    A tile that is not the first of its row (column) begins ``Overlap`` px before its own place.
    """
    dzi = blob(repository, f"{slide}.dzi").decode()
    side_px, overlap_px = number(dzi, "TileSize"), number(dzi, "Overlap")
    full_px = (number(dzi, "Width"), number(dzi, "Height"))
    found = re.search(r'\bFormat="(\w+)"', dzi)
    suffix = found[1] if found else "jpeg"
    below = (max(full_px) - 1).bit_length() - level
    if below < 0:
        raise SystemExit(f"{slide}.dzi has no level {level}: its top level is {level + below}")
    width_px, height_px = (-(-px // 2**below) for px in full_px)
    picture = Image.new("RGB", (width_px, height_px), "white")
    for column in range(-(-width_px // side_px)):
        for row in range(-(-height_px // side_px)):
            name = f"{slide}_files/{level}/{column}_{row}.{suffix}"
            tile = Image.open(io.BytesIO(blob(repository, name))).convert("RGB")
            x, y = (max(0, index * side_px - overlap_px) for index in (column, row))
            picture.paste(tile, (x, y))
    return picture


def main() -> None:
    """Writes the picture as JPEG of quality 95."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path, help="a git directory, bare or not")
    parser.add_argument("slide", help="the name of the .dzi, without its suffix")
    parser.add_argument("level", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    assemble(args.repository, args.slide, args.level).save(args.out, quality=95)


if __name__ == "__main__":
    main()
