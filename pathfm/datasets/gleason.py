"""Gleason (Arvaniti): 22,752 patches of prostate tissue microarrays in four classes."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.listing import files_under, lacking
from pathfm.datasets.sources import assemble
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="gleason",
    title="Gleason (Arvaniti)",
    task="classification",
    classes=("benign", "gleason_3", "gleason_4", "gleason_5"),
    mpp=0.23,
    counts={"train": 15303, "val": 2482, "test": 4967},
    licence="CC0 1.0",
    page="https://dataverse.harvard.edu/dataset.xhtml?persistentId=doi:10.7910/DVN/OCYCMP",
    layout=(
        "train_validation_patches_750/<core>/*_class_<0-3>.jpg and "
        "test_patches_750/patho_1/<core>/*_class_<0-3>.jpg, as create_patches.py of "
        "github.com/eiriniar/gleason_CNN writes them"
    ),
    reported="val",  # eva leaves the test set alone: its scores there are unstable
)

_TRAIN_ARRAYS = ("ZT111", "ZT199", "ZT204")
_VAL_ARRAY = "ZT76"
_FOLDERS = ("train_validation_patches_750", "test_patches_750/patho_1")
_NAME = re.compile(r"(?P<core>(?P<array>[^_]+)_.+)_patch_\d+_class_(?P<label>[0-3])")


def open_gleason(root: Path) -> Benchmark:
    """The patches in the order of their paths; the group is the core (the spot of the microarray)."""
    for folder in _FOLDERS:
        if not (root / folder).is_dir():
            raise lacking(FACTS, root, f"there is no folder {folder}")
    paths = sorted(path for folder in _FOLDERS for path in files_under(root, folder, (".jpg",)))
    if not paths:
        raise lacking(FACTS, root, "there are no .jpg")
    labels, splits, groups = [], [], []
    for path in paths:
        named = _NAME.fullmatch(PurePosixPath(path).stem)
        if named is None:
            raise PathfmError(
                f"{root / path}: no name of this set (ZT111_4_A_1_12_patch_0_class_1.jpg); remove the file"
            )
        labels.append(int(named["label"]))
        splits.append(_split(named["array"], path, root))
        groups.append(named["core"])
    return assemble(FACTS, root, paths, labels, splits, groups)


def _split(array: str, path: str, root: Path) -> str:
    if array == _VAL_ARRAY:
        return "val"
    if array in _TRAIN_ARRAYS:
        return "train"
    if path.startswith("test_patches_750/"):
        return "test"
    raise PathfmError(
        f"{root / path}: microarray {array} is in no split ({', '.join(_TRAIN_ARRAYS)} train, "
        f"{_VAL_ARRAY} val); remove the file"
    )
