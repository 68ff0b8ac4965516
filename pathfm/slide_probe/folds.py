"""Train, validation and test slides: given ones checked, or folds that keep patients together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import words
from pathfm.runtime import PathfmError

_STREAM_FOLD = 404

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows that are fitted on (train), that choose the epoch (val) and that are reported (test).

    test may be empty: then validation chooses and reports, and tables must say so (`val_reports`).
    """

    train: Rows
    val: Rows
    test: Rows

    @property
    def val_reports(self) -> bool:
        """Whether the rows that choose are the ones reported."""
        return len(self.test) == 0


def checked(
    parts: Parts, labels: NDArray[np.int64], groups: Sequence[str], classes: Sequence[str]
) -> Parts:
    """The parts, known to share no slide and no patient, with every class in train, val and test.

    Raises PathfmError with the patient, or the class, otherwise.
    """
    named = {"train": parts.train, "val": parts.val, "test": parts.test}
    seen: dict[str, str] = {}
    for part, rows in named.items():
        for group in {groups[i] for i in rows}:
            if seen.setdefault(group, part) != part:
                raise PathfmError(
                    f"{group} is in {seen[group]} and in {part}: its slides would be learnt by heart "
                    "and then asked. Split by patient"
                )
        missing = [c for k, c in enumerate(classes) if not (labels[rows] == k).any()]
        if missing and (len(rows) or part != "test"):
            raise PathfmError(
                f"{part} has {len(rows)} slides and none of class {missing[0]!r}: add some, give fewer "
                "folds, or leave the class out"
            )
    return parts


def parts_of(
    splits: Sequence[str],
    labels: NDArray[np.int64],
    groups: Sequence[str],
    classes: Sequence[str],
) -> Parts:
    """The parts that a table's own splits mean, checked."""
    train, val, test = (
        np.flatnonzero(np.asarray(splits) == name) for name in ("train", "val", "test")
    )
    return checked(Parts(train, val, test), labels, groups, classes)


def fold_of(
    labels: NDArray[np.int64], groups: Sequence[str], n_folds: int, seed: int = 0, repeat: int = 0
) -> NDArray[np.int64]:
    """The fold of each slide, (n,) from 0: no group in two, and classes spread as groups allow.

    Groups are taken from the most to the least uneven in their classes, ties in a random order that
    depends on (seed, repeat) alone, and put where the folds' shares of every class then differ least
    (scikit-learn's StratifiedGroupKFold). Raises PathfmError for fewer groups than folds.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if not 2 <= n_folds <= len(names):
        raise PathfmError(
            f"n_folds = {n_folds} with {len(names)} patients: wants 2 to {len(names)}"
        )
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (group, labels), 1)
    present = counts.sum(axis=0) > 0
    counts = counts[:, present]
    keys = words(seed, np.arange(len(names)), repeat, _STREAM_FOLD, 1)[:, 0]
    order = np.lexsort((keys, -counts.std(axis=1)))
    total, fold = np.zeros((n_folds, counts.shape[1])), np.zeros(len(names), np.int64)
    for g in order:
        fold[g] = _best_fold(total, counts[g], counts.sum(axis=0))
        total[fold[g]] += counts[g]
    found: NDArray[np.int64] = fold[group]
    return found


def _best_fold(
    total: NDArray[np.float64], add: NDArray[np.float64], all_: NDArray[np.float64]
) -> int:
    """Where `add` leaves the folds' class shares most even; ties: the fold with fewest slides."""
    unevenness = []
    for k in range(len(total)):
        tried = total.copy()
        tried[k] += add
        unevenness.append((tried / all_).std(axis=0).mean())
    even = np.asarray(unevenness)
    near = np.flatnonzero(np.isclose(even, even.min(), rtol=0, atol=1e-12))
    return int(near[total[near].sum(axis=1).argmin()])


def grouped_folds(
    labels: NDArray[np.int64],
    groups: Sequence[str],
    classes: Sequence[str],
    n_folds: int,
    seed: int = 0,
    repeat: int = 0,
) -> list[Parts]:
    """One `Parts` a fold: that fold is the test, the next one chooses the epoch, the rest is fitted on.

    Every slide is tested exactly once. Raises PathfmError for fewer than three folds or patients, and
    where a part would lack a class.
    """
    if n_folds < 3:
        raise PathfmError(f"n_folds = {n_folds}: wants 3 or more (train, validation, test)")
    fold = fold_of(labels, groups, n_folds, seed, repeat)
    found = []
    for k in range(n_folds):
        test, val = fold == k, fold == (k + 1) % n_folds
        parts = Parts(*(np.flatnonzero(rows) for rows in (~test & ~val, val, test)))
        found.append(checked(parts, labels, groups, classes))
    return found
