"""A folder of pictures with a class a pixel: `images/*.png|jpg|tif` and `masks/*.png` of the same names.

Or `<train|val|test>/images` and `/masks`. A mask is a PNG of one number a pixel (grey, 16 bit, or a palette's
indices). `classes.csv` (header `number,name`, perhaps `ignored`) says what the numbers mean, the background
first; without it they are 0 (background), 1, 2, ... `groups.csv` (`path,group`) names patients or slides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfm.datasets.benchmark import SPLITS, Benchmark, Facts
from pathfm.datasets.folder import SUFFIXES, picture_size, read_picture
from pathfm.datasets.labelled import refuse_other_folders
from pathfm.datasets.listing import files_under, folders_in, read_groups, read_rows, refuse_link_out
from pathfm.datasets.sources import assemble, file_digest
from pathfm.datasets.table import refuse_torn
from pathfm.runtime import PathfmError

MOST_NUMBERS = 1 << 16
MOST_CLASSES = 255
MOST_UNLISTED = 64
"""Without classes.csv a larger number is taken for a grey level, not for a class."""
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_YES, _NO = {"1", "yes", "true"}, {"", "0", "no", "false"}


@dataclass(frozen=True)
class MaskClasses:
    """Class names, background first, and the number of each in the masks.

    ignored: numbers whose pixels are no class; together they are class `len(names)`, where there are any.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    ignored: tuple[int, ...] = ()

    def table(self) -> NDArray[np.int16]:
        """(65536,): the class of each number, -1 for none."""
        found = np.full(MOST_NUMBERS, -1, np.int16)
        found[list(self.numbers)] = np.arange(len(self.numbers))
        found[list(self.ignored)] = len(self.names)
        return found


@dataclass(frozen=True)
class MaskFiles:
    """Pictures with masks in files of their own, paths relative to the root."""

    root: Path
    paths: tuple[str, ...]
    masks: tuple[str, ...]
    classes: MaskClasses
    table: NDArray[np.int16] = field(repr=False)

    def read(self, i: int) -> NDArray[np.uint8]:
        """The picture as uint8 (height, width, 3)."""
        return np.asarray(read_picture(self.root / self.paths[i]))

    def mask(self, i: int) -> NDArray[np.uint8]:
        """The classes, uint8 (height, width)."""
        file = self.root / self.masks[i]
        numbers = read_mask(file)
        found = self.table[numbers]
        if found.min() < 0:
            raise PathfmError(f"{file}: holds {_strange(numbers, found)}, no class")
        return found.astype(np.uint8)

    def content(self, i: int) -> str:
        """SHA-256 of the picture, of its mask and of what the mask's numbers mean."""
        files = (self.root / self.paths[i], self.root / self.masks[i])
        numbers = "".join(f"{n:04x}" for n in (*self.classes.numbers, *self.classes.ignored))
        return "".join(file_digest(file) for file in files) + numbers


def is_mask_folder(root: Path) -> bool:
    """Whether a folder has `images` and `masks`, itself or under train, val or test."""
    return any(
        (root / part / "images").is_dir() and (root / part / "masks").is_dir()
        for part in ("", *SPLITS)
    )


def open_mask_folder(root: Path) -> Benchmark:
    """The pictures by split, then name. Opens every mask, so that nothing is found out later.

    Raises `PathfmError` that counts and names pictures without a mask, masks without a picture, masks of
    another size than their picture, and masks with numbers that are no class; and for a group in two splits.
    """
    whole = (root / "images").is_dir()
    splits = [""] if whole else [split for split in SPLITS if (root / split / "images").is_dir()]
    _refuse_unread(root, splits)
    paths: list[str] = []
    of: list[str] = []
    for split in splits:
        found = _pictures(root, f"{split}/images" if split else "images")
        paths += found
        of += [split] * len(found)
    masks = [_mask_path(path) for path in paths]
    classes = read_classes(root) or _unlisted(root, masks)
    table = classes.table()
    _refuse_wrong(root, paths, masks, table)
    groups = read_groups(root, paths) or [""] * len(paths)
    skipped = bool(classes.ignored)
    facts = Facts(
        name=root.resolve().name,
        title=str(root),
        task="segmentation",
        classes=(*classes.names, "ignored") if skipped else classes.names,
        mpp=math.nan,
        counts={},
        licence="",
        page="",
        layout="",
        reported="val" if "val" in splits and "test" not in splits else "test",
        ignored=(len(classes.names),) if skipped else (),
    )
    source = MaskFiles(root, tuple(paths), tuple(masks), classes, table)
    found_set = assemble(facts, root, paths, [-1] * len(paths), of, groups, source)
    refuse_torn(found_set)
    return found_set


def _refuse_unread(root: Path, splits: Sequence[str]) -> None:
    """`PathfmError` for pictures or groups that lie where nobody looks."""
    with_images = [name for name in folders_in(root) if (root / name / "images").is_dir()]
    others = [name for name in with_images if name not in (*splits, "images", "masks")]
    if others and "" in splits:
        raise PathfmError(
            f"{root}: pictures lie in images and in {others[0]}/images, and only the former would be read; "
            "move one elsewhere"
        )
    refuse_other_folders(root, others)
    for split in filter(None, splits):
        if (root / split / "groups.csv").exists():
            raise PathfmError(
                f"{root / split / 'groups.csv'} is not read; write its rows into {root / 'groups.csv'}, "
                f"paths as {split}/images/..."
            )


def read_classes(root: Path) -> MaskClasses | None:
    """What classes.csv says, None without one; `PathfmError` for numbers or names that are none or twice."""
    table = root / "classes.csv"
    if not table.exists():
        return None
    refuse_link_out(root.resolve(), table)
    names: list[str] = []
    numbers: list[int] = []
    ignored: list[int] = []
    for line, row in enumerate(read_rows(table, ("number", "name")), start=2):
        text, skip = row["number"], row.get("ignored", "").lower()
        number = int(text) if text.isdecimal() and len(text) <= 5 else MOST_NUMBERS
        if number >= MOST_NUMBERS or number in (*numbers, *ignored):
            raise PathfmError(
                f"{table}, line {line}: number {text!r} is none of 0..65535, or twice"
            )
        if skip not in _YES | _NO:
            raise PathfmError(
                f"{table}, line {line}: ignored is {row['ignored']!r}, wants yes or no"
            )
        if skip in _YES:
            ignored.append(number)
        elif not row["name"] or row["name"] in names:
            raise PathfmError(
                f"{table}, line {line}: name {row['name']!r} is empty, or there twice"
            )
        else:
            names.append(row["name"])
            numbers.append(number)
    if not 2 <= len(names) <= MOST_CLASSES:
        raise PathfmError(
            f"{table}: {len(names)} classes, wants 2 to {MOST_CLASSES}, the background first"
        )
    return MaskClasses(tuple(names), tuple(numbers), tuple(ignored))


def read_mask(file: Path) -> NDArray[np.int64]:
    """The number of every pixel (height, width), 0..65535.

    `PathfmError` for what is no PNG of one number a pixel, or larger than 64 Mpx.
    """
    picture_size(file)  # refuses what is damaged or too large
    try:
        with Image.open(file, formats=("PNG",)) as image:
            if image.mode not in _MODES:
                raise PathfmError(
                    f"{file}: a mask in colour ({image.mode}); wants one number a pixel: a grey PNG, or "
                    "one with a palette"
                )
            values = np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PathfmError(f"{file}: not a readable PNG ({reason})") from None
    return np.clip(values, 0, MOST_NUMBERS - 1)


def _pictures(root: Path, folder: str) -> list[str]:
    """The pictures of one folder, sorted; each has its mask, and each mask its picture."""
    found = sorted(files_under(root, folder, SUFFIXES))
    wanted = [_mask_path(path) for path in found]
    at = _mask_path(folder + "/x").rpartition("/")[0]
    there = set(files_under(root, at, (".png",))) if (root / at).is_dir() else set()
    without = [path for path, mask in zip(found, wanted, strict=True) if mask not in there]
    alone = sorted(there - set(wanted))
    if without or alone or not found:
        told = [
            f"{len(without)} of {len(found)} pictures have no mask, first {without[0]}"
            if without
            else "",
            f"{len(alone)} masks have no picture, first {alone[0]}" if alone else "",
            "" if found else f"no pictures ({', '.join(SUFFIXES)}) in {folder}",
        ]
        raise PathfmError(f"{root}: {'; '.join(filter(None, told))}")
    if len(set(wanted)) < len(wanted):
        twice = next(mask for mask in wanted if wanted.count(mask) > 1)
        raise PathfmError(f"{root}: two pictures have the one mask {twice}: rename one")
    return found


def _mask_path(path: str) -> str:
    """train/masks/a.png of train/images/a.jpg."""
    head, _, tail = path.partition("images/")
    return f"{head}masks/{tail.rpartition('.')[0] or tail}.png"


def _unlisted(root: Path, masks: Sequence[str]) -> MaskClasses:
    """Classes 0 to the largest number in the masks, called by their numbers."""
    largest = max(int(read_mask(root / mask).max()) for mask in masks)
    if not 1 <= largest <= MOST_UNLISTED:
        raise PathfmError(
            f"{root}: the largest number in its masks is {largest}; say what numbers mean in classes.csv "
            "(number,name; the background first)"
        )
    names = ["background", *(f"class {n}" for n in range(1, largest + 1))]
    return MaskClasses(tuple(names), tuple(range(largest + 1)))


def _refuse_wrong(
    root: Path, paths: Sequence[str], masks: Sequence[str], table: NDArray[np.int16]
) -> None:
    """`PathfmError` that counts masks of wrong size and with unknown numbers, and names the first."""
    sizes, strange = [], []
    for path, mask, numbers in _opened(root, paths, masks):
        height, width = picture_size(root / path)
        if numbers.shape != (height, width):
            shape = f"{numbers.shape[1]} x {numbers.shape[0]}"
            sizes.append(f"{mask} of {shape} px for a picture of {width} x {height}")
        if (table[numbers] < 0).any():
            strange.append(f"{mask} ({_strange(numbers, table[numbers])})")
    n, told = len(paths), []
    if sizes:
        told.append(f"{len(sizes)} of {n} masks are not of their picture's size, first {sizes[0]}")
    if strange:
        told.append(
            f"{len(strange)} of {n} masks hold numbers that are no class, first {strange[0]}"
        )
    if told:
        raise PathfmError(f"{root}: {'; '.join(told)}")


def _opened(
    root: Path, paths: Sequence[str], masks: Sequence[str]
) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    for path, mask in zip(paths, masks, strict=True):
        yield path, mask, read_mask(root / mask)


def _strange(numbers: NDArray[np.int64], found: NDArray[np.int16]) -> str:
    """ "9 on 37 px" for each number that is no class, three at most."""
    values, counts = np.unique(numbers[found < 0], return_counts=True)
    pairs = list(zip(values.tolist(), counts.tolist(), strict=True))[:3]
    return ", ".join(f"{value} on {count:,} px" for value, count in pairs)
