"""The features of one slide as HDF5, in the form that CLAM and TRIDENT write and every MIL tool reads.

`features` float32 (n, d) and `coords` int64 (n, 2), the upper left corners in level-0 pixels. What
TRIDENT tells in attributes of `coords` is told there under its names; what these features were
made of is in attributes of the file. CLAM's data sets find `<data_dir>/h5_files/<slide_id>.h5`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pathfm.embeddings.container import replacing
from pathfm.runtime import PathfmError

FOLDER = "h5_files"
_FORMAT = "pathfm.bag.1"
_MAX_BYTES = 16 << 30
_MAX_DIM = 1 << 20
# The scanner's power for a µm/px, as TRIDENT tells it: the first bound that is not reached.
_POWERS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


@dataclass(frozen=True)
class BagFacts:
    """How a slide was cut and embedded; µm/px of the patches and of level 0, sides in pixels."""

    slide_id: str
    key: str  # what the features depend on: equal keys, equal files
    encoder: str
    encoder_digest: str
    mpp: float
    level0_mpp: float
    patch_px: int  # side at `mpp`
    overlap_px: float
    level0_width_px0: int
    level0_height_px0: int
    dropped: int = 0  # patches whose tiles were damaged

    def trident(self) -> dict[str, Any]:
        """The attributes of `coords` by TRIDENT's names."""
        return {
            "patch_size": self.patch_px,
            "patch_size_level0": round(self.patch_px * self.mpp / self.level0_mpp),
            "level0_magnification": magnification(self.level0_mpp),
            "target_magnification": magnification(self.mpp),
            "overlap": round(self.overlap_px),
            "name": self.slide_id,
            "level0_width": self.level0_width_px0,
            "level0_height": self.level0_height_px0,
        }


@dataclass(frozen=True)
class Bag:
    """One slide: features float32 (n, d), coords_px0 int64 (n, 2), x before y.

    facts: as `write_bag` was given them; None for a file of CLAM or TRIDENT. attributes: all that
    the file says of `coords`.
    """

    slide_id: str
    features: NDArray[np.float32]
    coords_px0: NDArray[np.int64]
    facts: BagFacts | None
    attributes: Mapping[str, Any]


def magnification(mpp: float) -> float:
    """The power of an objective that scans at this µm/px, as TRIDENT rounds it; coarser: 10 / µm/px."""
    for bound, power in _POWERS:
        if mpp < bound:
            return power
    return 10 / mpp


def bag_path(folder: Path, slide_id: str) -> Path:
    """Where a slide's bag lies below a folder; PathfmError for an id that is no file name."""
    if not slide_id or slide_id != Path(slide_id).name or slide_id[0] == ".":
        raise PathfmError(f"slide {slide_id!r}: an id with a path in it cannot name a file")
    return folder / FOLDER / f"{slide_id}.h5"


def write_bag(
    path: Path, facts: BagFacts, features: NDArray[np.float32], coords_px0: NDArray[np.int64]
) -> None:
    """Writes the file whole or not at all. An empty slide is written, (0, d), as TRIDENT does."""
    if features.ndim != 2 or coords_px0.shape != (len(features), 2):
        raise PathfmError(
            f"{path}: features {features.shape} and coords {coords_px0.shape} do not belong together"
        )
    if not np.isfinite(features).all():
        raise PathfmError(f"{path}: features that are not finite; the backbone has diverged")
    # HDF5 writes by name into the file that is then synced and put in place
    with replacing(path) as new, h5py.File(new.name, "w") as file:
        table = file.create_dataset("features", data=np.asarray(features, np.float32))
        table.attrs.update({"name": facts.slide_id, "encoder": facts.encoder})
        coords = file.create_dataset("coords", data=np.asarray(coords_px0, np.int64))
        coords.attrs.update(facts.trident())
        file.attrs.update({"format": _FORMAT, **asdict(facts)})


def bag_key(path: Path) -> str | None:
    """The key of a bag's features, or None where there is no usable bag of ours."""
    try:
        with h5py.File(path, "r") as file:
            facts = _facts(file)
            _check_shapes(path, file)
        return facts.key if facts else None
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, PathfmError):
        return None


def read_bag(path: Path) -> Bag:
    """The bag in a file of ours, of CLAM or of TRIDENT.

    Float16 features come as float32, coordinates of any number type as int64. Raises PathfmError for a
    missing or damaged file, links to other files, shapes that do not fit, and NaN.
    """
    try:
        with h5py.File(path, "r") as file:
            _check_shapes(path, file)
            facts, attributes = _facts(file), _plain(file["coords"].attrs)
            features = np.asarray(file["features"][()], np.float32).reshape(file["features"].shape)
            coords = np.rint(np.asarray(file["coords"][()], np.float64)).astype(np.int64)
    except FileNotFoundError:
        raise PathfmError(f"no bag at {path}: make it with `pathfm embed`") from None
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PathfmError(f"{path}: not a bag of features ({_why(error)})") from None
    features = features[0] if features.ndim == 3 else features
    if not np.isfinite(features).all():
        raise PathfmError(f"{path}: features that are not finite; embed the slide again")
    slide_id = facts.slide_id if facts else path.stem
    return Bag(slide_id, features, coords.reshape(-1, 2), facts, attributes)


def find_bags(folder: Path) -> dict[str, Path]:
    """Slide id -> file, by name, in a folder or in the `h5_files` in it; PathfmError for none."""
    inside = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    found = {p.stem: p for p in sorted(inside.glob("*.h5")) if p.name[0] != "."}
    if not found:
        raise PathfmError(f"no bags (*.h5) in {folder}: make them with `pathfm embed`")
    return found


def _check_shapes(path: Path, file: h5py.File) -> None:
    """PathfmError unless both tables are here, of numbers, fit each other and are of a bearable size."""
    for name in ("features", "coords"):
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise PathfmError(
                f"{path}: no table {name!r} in the file itself: is it a bag of features?"
            )
        table = file[name]
        if not isinstance(table, h5py.Dataset) or table.dtype.kind not in "fiu" or table.external:
            raise PathfmError(f"{path}: {name!r} is no table of numbers")
        if table.is_virtual or math.prod(table.shape) * table.dtype.itemsize > _MAX_BYTES:
            raise PathfmError(
                f"{path}: {name!r} is {table.shape}, of other files or too large to read"
            )
    features, coords = file["features"].shape, file["coords"].shape
    rows = features[1:] if len(features) == 3 and features[0] == 1 else features
    if len(rows) != 2 or rows[1] > _MAX_DIM or coords != (rows[0], 2):
        raise PathfmError(f"{path}: features {features} and coords {coords} do not belong together")


def _facts(file: h5py.File) -> BagFacts | None:
    """What `write_bag` wrote about itself; None where somebody else wrote the file."""
    told = _plain(file.attrs)
    if told.pop("format", None) != _FORMAT:
        return None
    return BagFacts(**told)


def _plain(attributes: Any) -> dict[str, Any]:
    """Attributes as Python's own numbers and texts."""
    pairs = ((str(name), value) for name, value in attributes.items())
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in pairs}


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
