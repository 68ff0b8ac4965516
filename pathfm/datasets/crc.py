"""CRC: 107,180 patches of colorectal tissue in nine classes (NCT-CRC-HE-100K, CRC-VAL-HE-7K).

Sizes of the splits: kaiko-eva's docs/datasets/crc.md (100,000 / 7,180). The counts of classes are confirmed by
no source that could be read.
"""

from __future__ import annotations

from pathlib import Path

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.class_folders import list_classes
from pathfm.datasets.sources import assemble

FACTS = Facts(
    name="crc",
    title="NCT-CRC-HE-100K / CRC-VAL-HE-7K",
    task="classification",
    classes=("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"),
    mpp=0.5,
    counts={"train": 100_000, "val": 7180},
    class_counts={
        "train": (10407, 10566, 11512, 11557, 8896, 13536, 8763, 10446, 14317),
        "val": (1338, 847, 339, 634, 1035, 592, 741, 421, 1233),
    },
    licence="CC BY 4.0",
    page="https://zenodo.org/records/1214456",
    layout="{NCT-CRC-HE-100K,CRC-VAL-HE-7K}/{ADI,BACK,DEB,LYM,MUC,MUS,NORM,STR,TUM}/*.tif",
)


def open_crc(root: Path) -> Benchmark:
    """The patches; patients are not published, but those of the two parts are different ones."""
    folders = {"train": "NCT-CRC-HE-100K", "val": "CRC-VAL-HE-7K"}
    paths, labels, splits = list_classes(FACTS, root, folders, (".tif",))  # type: ignore[arg-type]
    return assemble(FACTS, root, paths, labels, splits, groups=[""] * len(paths))
