"""BACH: 400 breast micrographs of four classes, split by patient as eva splits them."""

from __future__ import annotations

from pathlib import Path

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.listing import files_under, lacking
from pathfm.datasets.sources import assemble

FACTS = Facts(
    name="bach",
    title="BACH (ICIAR 2018)",
    task="classification",
    classes=("Benign", "InSitu", "Invasive", "Normal"),
    mpp=0.42,
    counts={"train": 268, "val": 132},
    class_counts={"train": (52, 70, 69, 77), "val": (48, 30, 31, 23)},
    class_counts_confirmed="100 a class, cut by eva's places in the list",
    licence="CC BY-NC-ND 4.0",
    page="https://zenodo.org/records/3632035",
    layout="ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/*.tif, 100 each",
)

_PHOTOS = "ICIAR2018_BACH_Challenge/Photos"
_PER_CLASS = 100
# Places in the list sorted by class and name; the published list of patients is not in the download.
# eva 0.4.5, so that no patient is on both sides.
_TRAIN = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))


def open_bach(root: Path) -> Benchmark:
    """The photos; `PathfmError` unless each class has its 100, for places in the list are the split."""
    paths: list[str] = []
    for name in FACTS.classes:
        folder = f"{_PHOTOS}/{name}"
        if not (root / folder).is_dir():
            raise lacking(FACTS, root, f"there is no folder {folder}")
        found = files_under(root, folder, (".tif",))
        if len(found) != _PER_CLASS:
            raise lacking(
                FACTS, root, f"{folder} has {len(found):,} pictures, and the split needs all 100"
            )
        paths += found
    in_train = [any(start <= i < stop for start, stop in _TRAIN) for i in range(len(paths))]
    return assemble(
        FACTS,
        root,
        paths,
        labels=[i // _PER_CLASS for i in range(len(paths))],
        splits=["train" if yes else "val" for yes in in_train],
        groups=[""] * len(paths),
    )
