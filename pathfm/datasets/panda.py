"""PANDA: 9,555 prostate biopsies by ISUP grade, without the tenth that has noisy labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets.benchmark import SPLITS, Benchmark, Facts
from pathfm.datasets.listing import files_under, lacking, read_rows
from pathfm.datasets.sources import SlideFiles, assemble
from pathfm.runtime import PathfmError

_TABLE = "train_with_noisy_labels.csv"
_TABLE_URL = "https://github.com/analokmaus/kaggle-panda-challenge-public (train.csv)"

FACTS = Facts(
    name="panda",
    title="PANDA",
    task="slide",
    classes=("0", "1", "2", "3", "4", "5"),
    mpp=0.5,
    counts={"train": 6686, "val": 1430, "test": 1439},
    licence="CC BY-NC-SA 4.0",
    page="https://www.kaggle.com/competitions/prostate-cancer-grade-assessment/data",
    layout=f"train_images/*.tiff and {_TABLE} from {_TABLE_URL}",
    reported="test",
    slide_patches=1000,
    slide_mpp=0.5,
)
FACTS_SMALL = replace(
    FACTS,
    name="panda_small",
    title="PANDA (small)",
    counts={"train": 955, "val": 477, "test": 477},
    slide_patches=200,
)

_SEED = 42  # eva's
_COLUMNS = ("image_id", "isup_grade", "noise_ratio_10")


def open_panda(root: Path) -> Benchmark:
    """The slides of eva's stratified split 70 : 15 : 15, in its order; the group is the slide."""
    return _open(FACTS, root, (0.7, 0.15, 0.15), everything=True)


def open_panda_small(root: Path) -> Benchmark:
    """A fifth of them: 10 % to train on, 5 % and 5 %."""
    return _open(FACTS_SMALL, root, (0.1, 0.05, 0.05), everything=False)


def _open(facts: Facts, root: Path, ratios: tuple[float, ...], everything: bool) -> Benchmark:
    folder, table = root / "train_images", root / _TABLE
    for needed in (folder, table):
        if not needed.exists():
            raise lacking(facts, root, f"there is no {needed.name}")
    rows = read_rows(table, _COLUMNS)
    grades = _clean_grades(table, rows)
    slides = sorted(files_under(root, "train_images", (".tiff",)))
    if len(slides) != len(rows):  # else the split would be another one
        raise lacking(
            facts, root, f"train_images has {len(slides):,} slides, {_TABLE} {len(rows):,} rows"
        )
    kept = [path for path in slides if PurePosixPath(path).stem in grades]
    labels = np.asarray([grades[PurePosixPath(path).stem] for path in kept], np.int64)
    parts = stratified(labels, ratios, everything)
    order = np.concatenate(parts)
    paths = [kept[i] for i in order]
    return assemble(
        facts,
        root,
        paths,
        labels=labels[order].tolist(),
        splits=[split for split, part in zip(SPLITS, parts, strict=True) for _ in part],
        groups=[PurePosixPath(path).stem for path in paths],
        source=SlideFiles(root, tuple(paths)),
    )


def _clean_grades(table: Path, rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """ISUP grade of every slide whose label is not noisy (noise_ratio_10 other than 0)."""
    grades = {}
    for row in rows:
        name, grade, kept = (row[column] for column in _COLUMNS)
        try:
            clean = float(kept)
        except ValueError:
            clean = math.nan
        if grade not in FACTS.classes or math.isnan(clean):
            raise PathfmError(f"{table}: {name}: isup_grade {grade!r}, noise_ratio_10 {kept!r}")
        if clean != 0:
            grades[name] = int(grade)
    return grades


def stratified(
    labels: NDArray[np.int64], ratios: Sequence[float], everything: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of train, val and test, the classes in equal shares, in eva 0.4.5's very order.

    Each class is shuffled by numpy's Generator (seed 42), class after class, and cut by the ratios,
    rounded down, at least one; with `everything` the test takes what is left. House rule 5 asks for
    Philox; here another project's split is reproduced, and counts and a golden test guard it.
    """
    generator = np.random.default_rng(_SEED)
    train, val, test = [], [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        generator.shuffle(members)
        n_train, n_val, n_test = (math.floor(ratio * len(members)) or 1 for ratio in ratios)
        held_out = members[n_train + n_val :]
        train.append(members[:n_train])
        val.append(members[n_train : n_train + n_val])
        test.append(held_out if everything else held_out[:n_test])
    return np.concatenate(train), np.concatenate(val), np.concatenate(test)
