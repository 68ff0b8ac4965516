"""A folder of pictures as a benchmark: `<class>/*.png`, or `<train|val|test>/<class>/*.png`."""

from __future__ import annotations

import math
from pathlib import Path

from pathfm.datasets.benchmark import SPLITS, Benchmark, Facts
from pathfm.datasets.folder import LabelledFolder, scan_folder
from pathfm.datasets.sources import assemble
from pathfm.datasets.table import refuse_torn
from pathfm.runtime import PathfmError


def open_folder(root: Path) -> Benchmark:
    """The pictures of a folder. Without folders train and val or test, `splits` are "".

    `groups.csv` beside the classes names slides or patients; a group in two splits is refused, and
    so is a class that another split does not know.
    """
    present = [split for split in SPLITS if (root / split).is_dir()]
    if "train" not in present or len(present) == 1:
        return _whole(root, scan_folder(root))
    parts = {split: scan_folder(root / split) for split in present}
    classes = parts["train"].classes
    paths: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    groups: list[str] = []
    for split, part in parts.items():
        strange = sorted(set(part.classes) - set(classes))
        if strange:
            raise PathfmError(f"{root / split}: class {strange[0]!r} is not in {root / 'train'}")
        paths += [f"{split}/{path}" for path in part.paths]
        labels += [classes.index(part.classes[label]) for label in part.labels]
        splits += [split] * len(part)
        groups += part.groups or [""] * len(part)
    found = assemble(_facts(root, classes, present[-1]), root, paths, labels, splits, groups)
    refuse_torn(found)
    return found


def _whole(root: Path, folder: LabelledFolder) -> Benchmark:
    n = len(folder)
    groups = folder.groups or [""] * n
    facts = _facts(root, folder.classes, "test")
    return assemble(facts, root, folder.paths, folder.labels.tolist(), [""] * n, groups)


def _facts(root: Path, classes: tuple[str, ...], last: str) -> Facts:
    return Facts(
        name=root.resolve().name,
        title=str(root),
        task="classification",
        classes=classes,
        mpp=math.nan,
        counts={},
        licence="",
        page="",
        layout="",
        reported="test" if last == "test" else "val",
    )
