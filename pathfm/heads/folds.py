"""Train, validation and test rows: given ones checked, or folds that keep patients together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import words
from pathfm.probing.parts import Parts
from pathfm.runtime import PathfmError

_STREAM_FOLD = 404


def checked(
    parts: Parts,
    groups: Sequence[str],
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] = (),
) -> Parts:
    """The parts, known to share no group (patient, else slide or picture) and to hold every class.

    labels: a class a row; None: rows have no classes. An empty test part may lack them.
    Raises PathfmError with the group, or the class, otherwise.
    """
    named = {"train": parts.train, "val": parts.val, "test": parts.test}
    seen: dict[str, str] = {}
    for part, rows in named.items():
        for group in {groups[i] for i in rows}:
            if seen.setdefault(group, part) != part:
                raise PathfmError(
                    f"{group} is in {seen[group]} and in {part}: what belongs to it would be learnt by "
                    "heart and then asked. Split by patient"
                )
        if labels is None:
            continue
        missing = [c for k, c in enumerate(classes) if not (labels[rows] == k).any()]
        if missing and (len(rows) or part != "test"):
            raise PathfmError(
                f"{part} has {len(rows)} samples and none of class {missing[0]!r}: add some, give fewer "
                "folds, or leave the class out"
            )
    return parts


def fold_of(
    labels: NDArray[np.int64], groups: Sequence[str], n_folds: int, seed: int = 0, repeat: int = 0
) -> NDArray[np.int64]:
    """The fold of each row, (n,) from 0: no group in two, and classes spread as groups allow.

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
    """Where `add` leaves the folds' class shares most even; ties: the fold with fewest rows."""
    unevenness = []
    for k in range(len(total)):
        tried = total.copy()
        tried[k] += add
        unevenness.append((tried / all_).std(axis=0).mean())
    even = np.asarray(unevenness)
    near = np.flatnonzero(np.isclose(even, even.min(), rtol=0, atol=1e-12))
    return int(near[total[near].sum(axis=1).argmin()])


def grouped_folds(
    groups: Sequence[str],
    n_folds: int,
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
    repeat: int = 0,
) -> list[Parts]:
    """One `Parts` a fold: that fold is the test, the next one chooses the epoch, the rest is fitted on.

    Every row is tested exactly once. labels: as of `checked`; without them folds are of even sizes.
    Raises PathfmError for fewer than three folds or groups, and where a part would lack a class.
    """
    if n_folds < 3:
        raise PathfmError(f"n_folds = {n_folds}: wants 3 or more (train, validation, test)")
    even = np.zeros(len(groups), np.int64) if labels is None else labels
    fold = fold_of(even, groups, n_folds, seed, repeat)
    found = []
    for k in range(n_folds):
        test, val = fold == k, fold == (k + 1) % n_folds
        train = ~test & ~val
        parts = Parts(np.flatnonzero(train), np.flatnonzero(val), np.flatnonzero(test))
        found.append(checked(parts, groups, labels, classes))
    return found


def parts_of(
    splits: Sequence[str],
    groups: Sequence[str],
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] = (),
) -> Parts:
    """The parts that a table's own splits mean, checked."""
    return checked(Parts.of_names(splits, labels, groups), groups, labels, classes)


def told_of(parts: Parts, n_folds: int | None = None) -> str:
    """Which rows are reported, and what chose the epoch."""
    if n_folds is not None:
        return f"{n_folds} folds by patient (another fold chose the epoch)"
    if parts.reported_on == "val":
        return "val (it chose the epoch too)"
    chose = "a part of train, cut out as there is no val," if parts.carved else "val"
    return f"test ({chose} chose the epoch)"
