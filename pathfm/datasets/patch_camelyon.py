"""PatchCamelyon: 327,680 patches of lymph nodes in six HDF5 files, half of them with tumour."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pathfm.datasets.benchmark import SPLITS, Benchmark, Facts
from pathfm.datasets.listing import lacking, read_rows, refuse_link_out
from pathfm.datasets.sources import assemble
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="patch_camelyon",
    title="PatchCamelyon",
    task="classification",
    classes=("no_tumor", "tumor"),
    mpp=1.0,
    counts={"train": 262_144, "val": 32_768, "test": 32_768},
    shares=(0.5, 0.5),
    licence="CC0 1.0",
    page="https://zenodo.org/records/2546921",
    layout=(
        "camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, unpacked from .h5.gz; "
        "with ..._meta.csv beside them slides are known"
    ),
    reported="test",
)
FACTS_10SHOT = replace(FACTS, name="patch_camelyon_10shot", title="PatchCamelyon 10-shot", shots=10)

_FILE_PARTS = {"train": "train", "val": "valid", "test": "test"}
_SIDE_PX = 96
_MAX_ROWS = 4_000_000
_MAX_CHUNK_BYTES = (
    256 << 20
)  # one is held in memory whole, and a file of a kilobyte can declare any size
# Chunks of the published files hold many patches: HDF5's default cache of 1 MiB would decompress a
# whole one for every patch.
_CHUNK_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class H5Pictures:
    """Patches in the dataset `x`, uint8 (n, 96, 96, 3), of several files, one after the other."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]  # number of the first sample of each file
    opened: dict[Path, Any] = field(default_factory=dict, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Sample i as uint8 (96, 96, 3)."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        file, row = self.files[part], i - self.starts[part]
        with self.lock, _told(file):
            if file not in self.opened:
                self.opened[file] = h5py.File(file, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES)["x"]
            return np.asarray(self.opened[file][row], np.uint8)

    def content(self, i: int) -> str:
        """SHA-256 of the patch's pixels."""
        return hashlib.sha256(self.read(i).tobytes()).hexdigest()

    def __reduce__(self) -> tuple[object, ...]:
        return (H5Pictures, (self.files, self.starts))  # open files and locks stay behind


def open_patch_camelyon(root: Path) -> Benchmark:
    """The patches of the three splits; the group is the slide where the meta tables are there."""
    return _open(FACTS, root)


def open_patch_camelyon_10shot(root: Path) -> Benchmark:
    """The same; `facts.shots` tells `pathfm probe` to train each of 50 runs on 10 new samples a class."""
    return _open(FACTS_10SHOT, root)


def _open(facts: Facts, root: Path) -> Benchmark:
    paths: list[str] = []
    labels: list[NDArray[np.int64]] = []
    splits: list[str] = []
    groups: list[str] = []
    files, starts = [], []
    for split in SPLITS:
        stem = f"camelyonpatch_level_2_split_{_FILE_PARTS[split]}"
        x, y = root / f"{stem}_x.h5", root / f"{stem}_y.h5"
        for file in (x, y):
            if not file.is_file():
                raise lacking(facts, root, f"there is no {file.name}")
            refuse_link_out(root.resolve(), file)
        here = _labels(x, y)
        files.append(x)
        starts.append(len(paths))
        paths += [f"{x.name}#{row}" for row in range(len(here))]
        labels.append(here)
        splits += [split] * len(here)
        groups += _slides(root / f"{stem}_meta.csv", len(here))
    source = H5Pictures(tuple(files), tuple(starts))
    return assemble(facts, root, paths, np.concatenate(labels).tolist(), splits, groups, source)


def _labels(x: Path, y: Path) -> NDArray[np.int64]:
    """Classes (n,), after a look at the shapes of both files."""
    with _told(x), h5py.File(x, "r") as file:
        n = _dataset(x, file, "x", (_SIDE_PX, _SIDE_PX, 3)).shape[0]
    with _told(y), h5py.File(y, "r") as file:
        data = _dataset(y, file, "y", (1, 1, 1))
        if data.shape[0] != n:
            raise PathfmError(f"{y}: {data.shape[0]:,} labels for the {n:,} patches of {x.name}")
        found = np.asarray(data[:], np.int64).reshape(n)
    if n and not 0 <= found.min() <= found.max() <= 1:
        raise PathfmError(f"{y}: labels {found.min()} to {found.max()}, wanted 0 and 1")
    return found


def _dataset(path: Path, file: Any, key: str, shape: tuple[int, ...]) -> Any:
    """A dataset of that shape which lies in this very file, not behind a link to another one."""
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise PathfmError(f"{path}: no dataset {key!r} in it; download the file anew")
    data = file[key]
    if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
        raise PathfmError(f"{path}: {key!r} is no dataset of its own; download the file anew")
    if data.shape[1:] != shape or data.dtype != np.uint8 or data.shape[0] > _MAX_ROWS:
        raise PathfmError(
            f"{path}: {key!r} is {data.dtype} {data.shape}, wanted uint8 {('n', *shape)} "
            f"with n at most {_MAX_ROWS:,}"
        )
    chunk = math.prod(data.chunks or (0,)) * data.dtype.itemsize
    if chunk > _MAX_CHUNK_BYTES:
        raise PathfmError(
            f"{path}: {key!r} is stored in chunks of {chunk >> 20:,} MiB, each read whole; the limit is "
            f"{_MAX_CHUNK_BYTES >> 20} MiB. Download the file anew, or write it in smaller chunks"
        )
    return data


def _slides(table: Path, n: int) -> list[str]:
    if not table.is_file():
        return [""] * n
    rows = read_rows(table, ("wsi",))
    if len(rows) != n:
        raise PathfmError(f"{table}: {len(rows):,} rows for {n:,} patches")
    return [row["wsi"] for row in rows]


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PathfmError(
            f"{file}: not a readable HDF5 file ({reason}); unpack or download it anew"
        ) from None
