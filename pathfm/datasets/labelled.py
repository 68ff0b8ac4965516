"""A folder of pictures as a benchmark: `<class>/*.png`, or `<train|val|test>/<class>/*.png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pathfm.datasets.benchmark import SPLITS, Benchmark, Facts, SplitName
from pathfm.datasets.folder import LabelledFolder, scan_folder
from pathfm.datasets.listing import folders_in, read_groups
from pathfm.datasets.sources import assemble
from pathfm.datasets.table import refuse_torn
from pathfm.runtime import PathfmError

_MEANT = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "tests", "testset", "holdout"), "test"),
}
"""What folders of splits are called elsewhere, in lower case."""


def open_folder(root: Path) -> Benchmark:
    """The pictures of a folder. Without folders train and val or test, `splits` are "".

    `groups.csv` names slides or patients: beside the classes, in each split's folder or in the root
    for all. A group in two splits is refused, and so are a class that another split does not know, groups
    of some splits only, and a folder beside the splits that is none.
    """
    names = folders_in(root)
    present = [split for split in SPLITS if split in names]
    if "train" not in present or len(present) == 1:
        alike = [name for name in names if name.lower() in _MEANT and name not in SPLITS]
        refuse_other_folders(root, [name for name in alike if folders_in(root / name)])
        return _whole(root, scan_folder(root))
    refuse_other_folders(root, [name for name in names if name not in present])
    parts = {split: scan_folder(root / split) for split in present}
    classes = parts["train"].classes
    paths: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    for split, part in parts.items():
        strange = sorted(set(part.classes) - set(classes))
        if strange:
            raise PathfmError(f"{root / split}: class {strange[0]!r} is not in {root / 'train'}")
        paths += [f"{split}/{path}" for path in part.paths]
        labels += [classes.index(part.classes[label]) for label in part.labels]
        splits += [split] * len(part)
    groups = _groups(root, parts, paths)
    found = assemble(_facts(root, classes, present[-1]), root, paths, labels, splits, groups)
    refuse_torn(found)
    return found


def refuse_other_folders(root: Path, others: Sequence[str]) -> None:
    """`PathfmError` for folders beside the splits whose pictures nobody would read."""
    if not others:
        return
    meant = _MEANT.get(others[0].lower(), "")
    remedy = f"Rename it {meant}" if meant and not (root / meant).exists() else "Rename it"
    raise PathfmError(
        f"{root}: the folder {others[0]!r} is no split (train, val, test), so its pictures would be left "
        f"out unsaid. {remedy}, or move it elsewhere"
    )


def _groups(root: Path, parts: Mapping[SplitName, LabelledFolder], paths: list[str]) -> list[str]:
    """The group of each picture, by the root's groups.csv or by those of all splits; "" without any."""
    told, own = read_groups(root, paths), [split for split, part in parts.items() if part.groups]
    lacking = [split for split in parts if split not in own]
    if told and own:
        raise PathfmError(
            f"{root}: groups.csv lies there and in {own[0]} too, and they may differ; keep one"
        )
    if own and lacking:
        raise PathfmError(
            f"{root}: {own[0]} has a groups.csv and {lacking[0]} none, so a patient in both would not be "
            "seen; give all splits one, or the root one for all"
        )
    return told or [g for part in parts.values() for g in part.groups or [""] * len(part)]


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
