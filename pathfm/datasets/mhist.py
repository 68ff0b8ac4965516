"""MHIST: 3,152 patches of colorectal polyps, serrated adenoma against hyperplastic polyp.

Sizes of the splits: kaiko-eva's docs/datasets/mhist.md (2,175 / 977). The counts of classes are confirmed by
no source that could be read.
"""

from __future__ import annotations

from pathlib import Path

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.listing import lacking, named_file, read_rows
from pathfm.datasets.sources import assemble
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="mhist",
    title="MHIST",
    task="classification",
    classes=("SSA", "HP"),
    mpp=2.0,
    counts={"train": 2175, "val": 977},
    class_counts={"train": (630, 1545), "val": (360, 617)},
    licence="Dataset Research Use Agreement",
    page="https://bmirds.github.io/MHIST/#accessing-dataset",
    layout="annotations.csv (Image Name, Majority Vote Label, Partition) and images/MHIST_*.png",
)

_COLUMNS = ("Image Name", "Majority Vote Label", "Partition")
_SPLITS = {"train": "train", "test": "val"}  # eva selects and reports on the publisher's test


def open_mhist(root: Path) -> Benchmark:
    """The patches in the table's order."""
    table = root / "annotations.csv"
    for needed in (table, root / "images"):
        if not needed.exists():
            raise lacking(FACTS, root, f"there is no {needed.name}")
    paths, labels, splits = [], [], []
    for row in read_rows(table, _COLUMNS):
        name, label, part = (row[column] for column in _COLUMNS)
        if label not in FACTS.classes or part not in _SPLITS:
            raise PathfmError(
                f"{table}: {name}: class {label!r} in partition {part!r} is none of MHIST"
            )
        paths.append(f"images/{named_file(root / 'images', name, str(table))}")
        labels.append(FACTS.classes.index(label))
        splits.append(_SPLITS[part])
    return assemble(FACTS, root, paths, labels, splits, groups=[""] * len(paths))
