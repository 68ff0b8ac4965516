"""Train and test halves that depend on (seed, repeat) alone, keyed by Philox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import words
from pathfm.runtime import PathfmError

_STREAM_SPLIT = 402


@dataclass(frozen=True)
class Split:
    """Row numbers, ascending; no row is in both."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


def stratified_split(
    labels: NDArray[np.int64],
    test_share: float,
    seed: int,
    repeat: int,
    groups: Sequence[str] = (),
) -> Split:
    """Splits so that each class has `test_share` of its rows (rounded, at least one) in the test.

    With `groups` no group is on both sides, and the shares are met as well as whole groups allow.
    Raises `PathfmError` when a class cannot be on both sides.
    """
    if groups:
        in_test = _by_group(labels, test_share, seed, repeat, groups)
    else:
        in_test = _by_row(labels, test_share, seed, repeat)
    for label in np.unique(labels):
        on_test = int(in_test[labels == label].sum())
        if on_test in (0, int((labels == label).sum())):
            what = "groups" if groups else "samples"
            raise PathfmError(
                f"class {label} has too few {what} to be in train and in test "
                f"(test share {test_share:g}): add some, or leave the class out"
            )
    return Split(np.flatnonzero(~in_test), np.flatnonzero(in_test))


def _by_row(
    labels: NDArray[np.int64], test_share: float, seed: int, repeat: int
) -> NDArray[np.bool_]:
    keys = words(seed, np.arange(len(labels)), repeat, _STREAM_SPLIT, 1)[:, 0]
    in_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        n_test = max(1, round(test_share * len(members)))
        in_test[members[np.argsort(keys[members], kind="stable")[:n_test]]] = True
    return in_test


def _by_group(
    labels: NDArray[np.int64], test_share: float, seed: int, repeat: int, groups: Sequence[str]
) -> NDArray[np.bool_]:
    """Groups in random order, each put into the test if that brings the class counts nearer."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    n_classes = int(labels.max()) + 1
    counts = np.zeros((len(names), n_classes))
    np.add.at(counts, (group, labels), 1)
    missing = test_share * counts.sum(axis=0)
    keys = words(seed, np.arange(len(names)), repeat, _STREAM_SPLIT, 1)[:, 0]
    chosen = np.zeros(len(names), bool)
    for g in np.argsort(keys, kind="stable"):
        if np.abs(missing - counts[g]).sum() < np.abs(missing).sum():
            chosen[g] = True
            missing = missing - counts[g]
    in_test: NDArray[np.bool_] = chosen[group]
    return in_test
