"""BRACS: 4,539 regions of breast slides in seven classes, in the publisher's three splits.

Sizes of the splits: kaiko-eva's docs/datasets/bracs.md and its dataset class (3,657 / 312 / 570). The counts of classes
are confirmed by no source that could be read (the publisher's page has them in a table that was out of reach).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.class_folders import list_classes
from pathfm.datasets.sources import PictureFiles, assemble

FACTS = Facts(
    name="bracs",
    title="BRACS (regions of interest)",
    task="classification",
    classes=("0_N", "1_PB", "2_UDH", "3_FEA", "4_ADH", "5_DCIS", "6_IC"),
    mpp=0.25,
    counts={"train": 3657, "val": 312, "test": 570},
    class_counts={
        "train": (357, 714, 389, 624, 387, 665, 521),
        "val": (46, 43, 46, 49, 41, 40, 47),
        "test": (81, 79, 82, 83, 79, 85, 81),
    },
    licence="CC BY-NC 4.0",
    page="https://www.bracs.icar.cnr.it/download/",
    layout="BRACS_RoI/latest_version/{train,val,test}/{0_N,...,6_IC}/*.png",
    reported="test",
)

_MAX_PIXELS = 170_000_000  # regions of invasive carcinoma are large; pillow's own limit is 179 Mpx


def open_bracs(root: Path) -> Benchmark:
    """The regions; the group is the slide, the number in BRACS_264_N_1.png."""
    base = "BRACS_RoI/latest_version"
    folders = {split: f"{base}/{split}" for split in FACTS.counts}
    paths, labels, splits = list_classes(FACTS, root, folders, (".png",))
    found = assemble(FACTS, root, paths, labels, splits, groups=[_slide(path) for path in paths])
    return replace(found, source=PictureFiles(root, found.paths, _MAX_PIXELS))


def _slide(path: str) -> str:
    parts = PurePosixPath(path).stem.split("_")
    return "_".join(parts[:2]) if len(parts) >= 3 and parts[0] == "BRACS" else ""
