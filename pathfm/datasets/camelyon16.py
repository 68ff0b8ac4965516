"""Camelyon16: 399 slides of lymph nodes, with a metastasis or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.listing import files_under, lacking, read_table
from pathfm.datasets.sources import SlideFiles, assemble
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="camelyon16",
    title="Camelyon16",
    task="slide",
    classes=("normal", "tumor"),
    mpp=0.25,
    counts={"train": 216, "val": 54, "test": 129},
    licence="CC0 1.0",
    page="https://camelyon17.grand-challenge.org/Data/",
    layout="training/{normal,tumor}/*.tif, testing/images/test_*.tif, testing/reference.csv",
    reported="test",
    slide_patches=10_000,
    slide_mpp=0.25,
)
FACTS_SMALL = replace(
    FACTS, name="camelyon16_small", title="Camelyon16 (small)", slide_patches=1000
)

_FOLDERS = ("training/normal", "training/tumor", "testing/images")
# eva 0.4.5: the slides of PatchCamelyon's validation split
_VAL = {
    "normal": "010 013 016 017 019 020 025 030 031 032 052 056 057 067 076 079 085 095 098 099 101 102 "
    "105 106 109 129 132 137 142 143 148 152",
    "tumor": "001 005 011 012 013 019 031 037 043 046 057 065 069 071 073 079 080 081 082 085 097 109",
}
_VAL_SLIDES = frozenset(f"{kind}_{n}" for kind, numbers in _VAL.items() for n in numbers.split())


def open_camelyon16(root: Path) -> Benchmark:
    """The slides by split, then path; the group is the slide."""
    return _open(FACTS, root)


def open_camelyon16_small(root: Path) -> Benchmark:
    """The same slides, 1,000 patches of each instead of 10,000."""
    return _open(FACTS_SMALL, root)


def _open(facts: Facts, root: Path) -> Benchmark:
    for folder in _FOLDERS:
        if not (root / folder).is_dir():
            raise lacking(facts, root, f"there is no folder {folder}")
    reference = root / "testing/reference.csv"
    if not reference.is_file():
        raise lacking(facts, root, "there is no testing/reference.csv")
    rows = [*_training(facts, root), *_testing(facts, root, reference)]
    rows.sort(key=lambda row: (("train", "val", "test").index(row[2]), row[0]))
    paths = [path for path, _, _ in rows]
    return assemble(
        facts,
        root,
        paths,
        labels=[facts.classes.index(label) for _, label, _ in rows],
        splits=[split for _, _, split in rows],
        groups=[PurePosixPath(path).stem for path in paths],
        source=SlideFiles(root, tuple(paths)),
    )


def _training(facts: Facts, root: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(files_under(root, "training", (".tif",))):
        name = PurePosixPath(path).stem
        if path.count("/") != 2:
            continue  # masks, in folders of their own
        label = name.split("_")[0]
        if label not in facts.classes:
            raise PathfmError(f"{root / path}: neither normal_<n>.tif nor tumor_<n>.tif")
        yield path, label, "val" if name in _VAL_SLIDES else "train"


def _testing(facts: Facts, root: Path, reference: Path) -> Iterator[tuple[str, str, str]]:
    labels = {}
    for row in read_table(reference):
        if len(row) < 2 or row[1].lower() not in facts.classes:
            raise PathfmError(
                f"{reference}: {','.join(row)[:80]!r} is no <slide>,<Normal|Tumor>,..."
            )
        labels[row[0]] = row[1].lower()
    for path in sorted(files_under(root, "testing/images", (".tif",))):
        name = PurePosixPath(path).stem
        if name not in labels:
            raise PathfmError(f"{root / path}: {reference.name} has no row {name}")
        yield path, labels[name], "test"
