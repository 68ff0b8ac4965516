"""CoNSeP: 41 pictures of colorectal tissue with a class a pixel, by kind of nucleus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.io
from numpy.typing import NDArray

from pathfm.datasets.benchmark import Benchmark, Facts, SplitName
from pathfm.datasets.folder import MAX_PIXELS, picture_size, read_picture
from pathfm.datasets.listing import files_under, lacking
from pathfm.datasets.sources import assemble, file_digest
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="consep",
    title="CoNSeP",
    task="segmentation",
    classes=("background", "other", "inflammatory", "epithelial", "spindle-shaped"),
    mpp=0.25,
    counts={"train": 27, "val": 14},
    licence="Apache-2.0",
    page="https://warwick.ac.uk/TIA/data/hovernet/",
    layout="{Train,Test}/Images/{train,test}_<n>.png and {Train,Test}/Labels/{train,test}_<n>.mat",
    tile_px=250,
)

_FOLDERS: dict[SplitName, str] = {"train": "Train", "val": "Test"}
_KEY = "type_map"
# healthy and malignant epithelium (3, 4) become one class, fibroblast, muscle and endothelium (5-7)
# another, as in HoVer-Net (Graham et al. 2019)
_MERGED = np.asarray([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)


@dataclass(frozen=True)
class MatMasks:
    """Pictures (png) with masks (`type_map` of a MATLAB file), paths relative to the root."""

    root: Path
    paths: tuple[str, ...]

    def read(self, i: int) -> NDArray[np.uint8]:
        """The picture as uint8 (height, width, 3)."""
        return np.asarray(read_picture(self.root / self.paths[i]))

    def mask(self, i: int) -> NDArray[np.uint8]:
        """The five classes, uint8 (height, width)."""
        file = self.root / mask_path(self.paths[i])
        types = _type_map(file)
        height, width = picture_size(self.root / self.paths[i])
        if types.shape != (height, width):
            raise PathfmError(f"{file}: a mask of {types.shape}, its picture is {(height, width)}")
        return _MERGED[types]

    def content(self, i: int) -> str:
        """SHA-256 of the picture and of its mask."""
        files = (self.root / self.paths[i], self.root / mask_path(self.paths[i]))
        return "".join(file_digest(file) for file in files)


def open_consep(root: Path) -> Benchmark:
    """The pictures by split, then name; which slide they are of is not published."""
    paths: list[str] = []
    splits: list[str] = []
    for split, folder in _FOLDERS.items():
        if not (root / folder / "Images").is_dir():
            raise lacking(FACTS, root, f"there is no folder {folder}/Images")
        found = sorted(files_under(root, f"{folder}/Images", (".png",)))
        without = [path for path in found if not (root / mask_path(path)).is_file()]
        if without or not found:
            what = f"{mask_path(without[0])} is missing" if without else f"{folder}/Images is empty"
            raise lacking(FACTS, root, what)
        paths += found
        splits += [split] * len(found)
    n = len(paths)
    return assemble(FACTS, root, paths, [-1] * n, splits, [""] * n, MatMasks(root, tuple(paths)))


def mask_path(path: str) -> str:
    """Train/Labels/train_1.mat of Train/Images/train_1.png."""
    picture = PurePosixPath(path)
    return f"{picture.parts[0]}/Labels/{picture.stem}.mat"


def _type_map(file: Path) -> NDArray[np.int64]:
    """The classes 0 to 7 of a MATLAB file, int64 (height, width). Reads no other variable of it."""
    try:
        shapes = {name: shape for name, shape, _ in scipy.io.whosmat(file)}
        shape = shapes.get(_KEY, ())
        if len(shape) != 2 or shape[0] * shape[1] > MAX_PIXELS:
            raise ValueError(f"no {_KEY!r} of two dimensions and at most {MAX_PIXELS:,} px")
        values = np.asarray(scipy.io.loadmat(file, variable_names=[_KEY])[_KEY])
    except Exception as error:  # a foreign parser on a stranger's bytes raises whatever it meets
        reason = " ".join(str(error).split())
        raise PathfmError(f"{file}: not a readable mask ({reason}); download it anew") from None
    if values.dtype.kind not in "uif" or (values.size and not (values == np.floor(values)).all()):
        raise PathfmError(f"{file}: {_KEY!r} is {values.dtype}, wanted whole numbers")
    if values.size and not 0 <= values.min() <= values.max() < len(_MERGED):
        raise PathfmError(f"{file}: classes {values.min()} to {values.max()}, wanted 0 to 7")
    return values.astype(np.int64)
