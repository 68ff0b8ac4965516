"""Tissue drawn by hand on real thumbnails: the truth a mask is trained on and judged by.

`drawn/pictures.csv` lists the pictures, `drawn/<name>.geojson` holds what was drawn on each,
`drawn/again/<name>.geojson` a second, blind drawing of some. The pictures themselves are not ours to
pass on: they are looked for under folders the caller names, and checked by SHA-256.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfm.geojson import Polygon, rasterise, read_geojson
from pathfm.runtime import PathfmError, one_line

Mask = NDArray[np.bool_]

DRAWN = Path(__file__).parent / "drawn"
COLUMNS = (
    "name", "file", "sha256", "width_px", "height_px", "split", "stain_group", "stain", "licence",
    "origin", "source", "hard",
)  # fmt: skip
SPLITS = ("training", "validation", "evaluation")
STAIN_GROUPS = ("H&E", "IHC", "special")
INSIDE, OUTSIDE = ("fat", "pale"), ("pen", "bubble", "edge")
"""Kinds that must lie inside a mask, and kinds that must lie outside it."""
CLASSES = {
    "Tissue": "tissue", "Fat": "fat", "Pale stroma": "pale", "Pen": "pen", "Bubble": "bubble",
    "Edge": "edge", "Ignore": "ignore",
}  # fmt: skip
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Truth:
    """What one drawing says, all (h, w) bool; pixels in `ignore` take part in nothing."""

    tissue: Mask
    ignore: Mask
    kinds: Mapping[str, Mask]
    """fat and pale (inside tissue), pen, and bubble and edge (where they lie on glass)."""


@dataclass(frozen=True)
class DrawnPicture:
    """A picture, (h, w, 3) uint8, and its truth."""

    name: str
    rgb: NDArray[np.uint8]
    truth: Truth
    split: str
    stain_group: str
    stain: str
    licence: str
    origin: str
    source: str
    """The slide or case: pictures of one source are all in one split."""
    hard: tuple[str, ...] = ()
    again: Truth | None = field(default=None, repr=False)
    """A second drawing, made without sight of the first."""

    @property
    def case(self) -> str:
        """Alike for all pictures of one slide or case, and for no others: see `case_of`."""
        return case_of(self.origin, self.source)

    @property
    def tissue(self) -> Mask:
        """(h, w) bool: drawn tissue without what lies under pen."""
        return self.truth.tissue

    @property
    def ignore(self) -> Mask:
        """(h, w) bool: pixels that cannot be decided."""
        return self.truth.ignore

    @property
    def kinds(self) -> Mapping[str, Mask]:
        """fat, pale, pen, bubble, edge: (h, w) bool each."""
        return self.truth.kinds


def read_pictures(
    roots: Sequence[Path], split: str | None = None, drawn: Path = DRAWN
) -> list[DrawnPicture]:
    """The drawn pictures of a split (None: of all), by name, looked for under each root in turn.

    Raises `PathfmError` for a folder or split that does not exist, for pictures that are missing
    (three are named, with their origins) or differ from those drawn on, and for damaged drawings.
    """
    if split is not None and split not in SPLITS:
        raise PathfmError(f"no split {split!r} of drawn pictures: there are {', '.join(SPLITS)}")
    for root in roots:
        if not root.is_dir():
            raise PathfmError(f"pictures {root}: no such folder")
    rows = [r for r in read_table(drawn / "pictures.csv") if split in (None, r["split"])]
    found = {row["name"]: _find(row["file"], roots) for row in rows}
    missing = [f"{r['file']} (from {r['origin']})" for r in rows if found[r["name"]] is None]
    if missing:
        raise PathfmError(
            f"{len(missing)} of {len(rows)} drawn pictures are not under "
            f"{', '.join(map(str, roots)) or 'any folder: none was given'}: {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}. "
            f"Get them from there; all are in {drawn / 'pictures.csv'}"
        )
    return [_read(row, path, drawn) for row in rows if (path := found[row["name"]]) is not None]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a `pictures.csv`, by name; `PathfmError` names the line that is wrong.

    A source (see `case_of`) or a file that is in two splits is an error: what was trained on would
    be tested on.
    """
    text = _text(path)
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise PathfmError(f"{path}, line {reader.line_num}: {error}") from None
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise PathfmError(f"{path}: its columns must be {','.join(COLUMNS)}")
    split_of: dict[str, str] = {}
    names: set[str] = set()
    for at, row in enumerate(rows, start=2):
        wrong = _wrong(row)
        if row["name"] in names:
            wrong = f"a second row for {row['name']!r}"
        names.add(row["name"])
        if (
            not wrong
            and split_of.setdefault(case_of(row["origin"], row["source"]), row["split"])
            != row["split"]
        ):
            wrong = f"source {row['source']!r} is in two splits"
        if not wrong and split_of.setdefault(row["sha256"], row["split"]) != row["split"]:
            wrong = "the same file is in two splits"
        if wrong:
            raise PathfmError(f"{path}, row {at} ({row['name']}): {wrong}")
    return sorted(rows, key=lambda row: row["name"])


def case_of(origin: str, source: str) -> str:
    """What is alike for all pictures of one slide or case: the repository and the source.

    An origin may go on after its repository ("@" or a space) with the commit, file and level that a
    picture is from; two stains of one block differ there, and are one case all the same.
    """
    return f"{re.split('[@ ]', origin.strip(), maxsplit=1)[0]} {source}"


def _wrong(row: Mapping[str | None, Any]) -> str:
    """What is wrong with a row of the table, or ""."""
    if None in row or None in row.values():
        return f"wants {len(COLUMNS)} fields"
    for column, allowed in (("split", SPLITS), ("stain_group", STAIN_GROUPS)):
        if row[column] not in allowed:
            return f"{column} {row[column]!r} is none of {', '.join(allowed)}"
    if not row["name"] or not all(c.isalnum() or c in "._-" for c in row["name"]):
        return "a name has letters, digits, dots, dashes and underscores only"
    file = PurePosixPath(row["file"])
    if file.is_absolute() or ".." in file.parts or "\\" in row["file"] or not row["file"]:
        return f"file {row['file']!r} does not lie inside a folder"
    if not row["licence"] or not row["origin"] or not row["source"]:
        return "licence, origin and source must be given"
    return ""


def _find(file: str, roots: Iterable[Path]) -> Path | None:
    try:
        return next((root / file for root in roots if (root / file).is_file()), None)
    except OSError as error:  # a name longer than the file system has them
        raise PathfmError(f"pictures: {file[:60]!r}: {error.strerror}") from None


def _read(row: Mapping[str, str], path: Path, drawn: Path) -> DrawnPicture:
    data = _bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != row["sha256"]:
        raise PathfmError(
            f"{path}: not the picture that was drawn on (SHA-256 {digest[:12]}…, wanted "
            f"{row['sha256'][:12]}…). Get it again from {row['origin']}"
        )
    rgb = _rgb(path, data)
    drawing = drawn / f"{row['name']}.geojson"
    again = drawn / "again" / drawing.name
    return DrawnPicture(
        name=row["name"],
        rgb=rgb,
        truth=read_truth(drawing, digest, rgb.shape[:2]),
        again=read_truth(again, digest, rgb.shape[:2]) if again.exists() else None,
        hard=tuple(row["hard"].split()),
        **{k: row[k] for k in ("split", "stain_group", "stain", "licence", "origin", "source")},
    )


def _rgb(path: Path, data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PathfmError(f"{path}: {picture.size} px, more than {MAX_PIXELS:,} pixels")
            return np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PathfmError(f"{path}: not a readable picture ({one_line(error)})") from None


def read_truth(path: Path, sha256: str, shape: tuple[int, ...]) -> Truth:
    """The masks of a drawing, of `shape` (h, w).

    tissue = drawn Tissue, holes cut out, without Pen. fat and pale count inside tissue, bubble and
    edge on glass. Nothing counts in Ignore. Raises `PathfmError` when the file is damaged or belongs
    to another picture than that of `sha256` and `shape`.
    """
    polygons = _polygons(path, sha256, shape)
    drawn = {
        name: rasterise([p for p in polygons if p.name == drawn_as], (shape[0], shape[1]))
        for drawn_as, name in CLASSES.items()
    }
    ignore = drawn["ignore"]
    tissue = drawn["tissue"] & ~drawn["pen"]
    kinds = {name: drawn[name] & tissue & ~ignore for name in INSIDE}
    kinds["pen"] = drawn["pen"] & ~ignore
    for name in ("bubble", "edge"):
        kinds[name] = drawn[name] & ~tissue & ~drawn["pen"] & ~ignore
    return Truth(tissue & ~ignore, ignore, kinds)


def _polygons(path: Path, sha256: str, shape: tuple[int, ...]) -> list[Polygon]:
    """The polygons of a drawing, once it is known to be of this picture."""
    try:
        told = json.loads(_text(path))["picture"]
        size = (told["height_px"], told["width_px"])
        if told["sha256"] != sha256 or size != tuple(shape):
            raise PathfmError(
                f"{path}: drawn on another picture ({size[1]} x {size[0]} px, SHA-256 "
                f"{str(told['sha256'])[:12]}…) than the table tells of"
            )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PathfmError(f"{path}: not a drawing ({one_line(error)})") from None
    polygons = read_geojson(path)
    for number, polygon in enumerate(polygons, start=1):
        if polygon.name not in CLASSES:
            raise PathfmError(
                f"{path}: feature {number}: class {polygon.name!r} is none of {', '.join(CLASSES)}"
            )
    return polygons


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PathfmError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise PathfmError(f"{path}: {error.strerror}") from None


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise PathfmError(f"{path}: not a UTF-8 text file") from None
