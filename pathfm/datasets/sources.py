"""Where the samples of a data set come from: picture files, or whole slides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching import read_slide_index
from online_patching.errors import PatchingError
from online_patching.stores import is_remote
from pathfm.datasets.benchmark import Benchmark, Facts, SlideSource, Source
from pathfm.datasets.folder import MAX_PIXELS, read_picture
from pathfm.runtime import PathfmError

_END_BYTES = 1 << 20


@dataclass(frozen=True)
class PictureFiles:
    """Pictures in files, paths relative to the root."""

    root: Path
    paths: tuple[str, ...]
    max_pixels: int = MAX_PIXELS

    def read(self, i: int) -> NDArray[np.uint8]:
        """The picture as uint8 (height, width, 3)."""
        return np.asarray(read_picture(self.root / self.paths[i], self.max_pixels))

    def content(self, i: int) -> str:
        """SHA-256 of the file."""
        return file_digest(self.root / self.paths[i])


@dataclass(frozen=True)
class SlideFiles:
    """Whole slides: paths relative to the root, or URIs."""

    root: Path
    paths: tuple[str, ...]

    def slide(self, i: int) -> str:
        """The slide's path or URI."""
        path = self.paths[i]
        return path if is_remote(path) else str(self.root / path)

    def content(self, i: int) -> str:
        """A digest of the file's size and of the MiB at either end of it; of a folder or a remote
        slide, of its tile tables."""
        uri = self.slide(i)
        if not is_remote(uri) and not Path(uri).is_dir():
            return ends_digest(Path(uri))
        try:
            return read_slide_index(uri).digest
        except PatchingError as error:
            raise PathfmError(str(error)) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PathfmError(f"{path}: cannot be read: {error.strerror}") from None


def ends_digest(path: Path) -> str:
    """SHA-256 of a file's size and of the MiB at either end: a slide has gigabytes between."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            total = hashlib.sha256(f"{size}\n".encode())
            total.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            total.update(file.read(_END_BYTES))
    except OSError as error:
        raise PathfmError(f"{path}: cannot be read: {error.strerror}") from None
    return total.hexdigest()


def assemble(
    facts: Facts,
    root: Path,
    paths: Sequence[str],
    labels: Sequence[int],
    splits: Sequence[str],
    groups: Sequence[str],
    source: Source | SlideSource | None = None,
    mpp: Sequence[float] | None = None,
) -> Benchmark:
    """A benchmark whose rows are in the source's order; without a source, of picture files."""
    n = len(paths)
    return Benchmark(
        facts=facts,
        root=root,
        paths=tuple(paths),
        labels=np.asarray(labels, np.int64).reshape(n),
        splits=tuple(splits),
        groups=tuple(groups),
        mpp=np.full(n, facts.mpp) if mpp is None else np.asarray(mpp, np.float64),
        source=PictureFiles(root, tuple(paths)) if source is None else source,
        order=np.arange(n),
    )
