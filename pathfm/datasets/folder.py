"""A labelled folder of pictures: `<root>/<class>/*.png|jpg|tif`, the simplest data set there is.

An optional `<root>/groups.csv` (header `path,group`; path relative to the root) names what must
not be torn apart by a split: the slide, or better the patient, that a picture comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.philox import words
from pathfm.datasets.listing import files_under, folders_in, read_groups
from pathfm.datasets.pixels import FORMATS, unfit
from pathfm.runtime import PathfmError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MAX_PICTURES = 1_000_000
MAX_PIXELS = 64_000_000  # a patch, not a slide
CLUSTERED = "cluster-"
"""How groups begin that stand in for slides: clusters of features (`tools/cluster_groups.py`)."""
_STREAM_SUBSET = 401


class DamagedPictureError(PathfmError):
    """A file that is no picture, or not a whole one."""


@dataclass(frozen=True)
class LabelledFolder:
    """The pictures of a folder: paths relative to `root`, sorted, and their classes."""

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: tuple[str, ...] = ()  # one a picture, or none at all

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def splits(self) -> tuple[str, ...]:
        """None: whoever probes the folder splits it."""
        return ()

    @property
    def clustered(self) -> bool:
        """Whether the groups are clusters of features, made for want of slides."""
        return bool(self.groups) and all(group.startswith(CLUSTERED) for group in self.groups)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Picture i as uint8 (height, width, 3). `PathfmError` names one that cannot be read."""
        return np.asarray(read_picture(self.root / self.paths[i]))

    @property
    def digest(self) -> str:
        """SHA-256 over every path and every byte of every picture: reads the whole folder once."""
        total = hashlib.sha256()
        for path, group in zip(self.paths, self.groups or [""] * len(self), strict=True):
            try:
                content = hashlib.sha256((self.root / path).read_bytes()).hexdigest()
            except OSError as error:
                raise PathfmError(f"{self.root / path}: cannot be read: {error.strerror}") from None
            total.update(f"{path}\0{group}\0{content}\n".encode())
        return total.hexdigest()

    def subset(self, per_class: int, seed: int = 0) -> LabelledFolder:
        """At most `per_class` pictures of each class, chosen by Philox(seed, picture number)."""
        keys = words(seed, np.arange(len(self)), 0, _STREAM_SUBSET, 1)[:, 0]
        kept: list[int] = []
        for label in range(len(self.classes)):
            members = np.flatnonzero(self.labels == label)
            kept += members[np.argsort(keys[members], kind="stable")][:per_class].tolist()
        kept.sort()
        return LabelledFolder(
            root=self.root,
            classes=self.classes,
            paths=tuple(self.paths[i] for i in kept),
            labels=self.labels[kept],
            groups=tuple(self.groups[i] for i in kept) if self.groups else (),
        )


def scan_folder(root: Path) -> LabelledFolder:
    """Lists the pictures; opens none. Hidden and empty class folders are left out.

    Raises `PathfmError` if the root is missing, holds fewer than two classes with pictures, more
    than a million pictures, a link out of it, or a `groups.csv` that does not name every picture.
    """
    if not root.is_dir():
        raise PathfmError(f"labelled folder {root}: no such folder; wanted {root}/<class>/*.png")
    paths: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for name in folders_in(root):
        found = [path for path in files_under(root, name, SUFFIXES) if path.count("/") == 1]
        if found:
            paths += found
            labels += [len(classes)] * len(found)
            classes.append(name)
        if len(paths) > MAX_PICTURES:
            raise PathfmError(f"labelled folder {root}: more than {MAX_PICTURES:,} pictures")
    if len(classes) < 2:
        found_text = f"only the class {classes[0]!r}" if classes else "no class with pictures"
        raise PathfmError(
            f"labelled folder {root}: {found_text}; a probe needs at least two folders of "
            f"{', '.join(SUFFIXES)}"
        )
    groups = tuple(read_groups(root, paths))
    return LabelledFolder(root, tuple(classes), tuple(paths), np.asarray(labels, np.int64), groups)


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as RGB.

    `PathfmError` names a file that is damaged, no PNG, JPEG or TIFF, larger than 64 Mpx, deeper than
    8 bits a channel, of another colour space, or transparent anywhere (`pixels.unfit`).
    """
    with _opened(path, max_pixels) as image:
        if reason := unfit(image):
            raise PathfmError(f"{path}: {reason}")
        return image.convert("RGB")


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width in px by the file's header. Errors as of `read_picture`."""
    with _opened(path) as image:
        return image.height, image.width


def check_picture(path: Path) -> None:
    """Raises what `read_picture` does, as far as the file's header tells; decodes no pixel."""
    with _opened(path) as image:
        if reason := unfit(image, decode=False):
            raise PathfmError(f"{path}: {reason}")


@contextmanager
def _opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A picture of patch size; what fails in the block is the file's fault."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise PathfmError(
                    f"{path}: {image.width:,} x {image.height:,} px is no patch; "
                    f"the limit is {max_pixels:,} px"
                )
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        told = f"{path}: not a readable picture ({reason}). Remove it"
        raise DamagedPictureError(told) from None
