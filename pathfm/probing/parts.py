"""Which rows a probe is fitted on, which choose, and which are reported: three disjoint sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets.splits import stratified_split
from pathfm.runtime import PathfmError

Rows = NDArray[np.int64]
SPLITS = ("train", "val", "test")
CARVED_SHARE = 0.2
"""Share of train that chooses where a data set has a test and no val."""


@dataclass(frozen=True)
class Parts:
    """Row numbers of a feature matrix; no row is in two parts, none is there twice.

    A function that fits takes a `Parts` and touches `train` and `val` only: what it returns is applied
    to `reported` by the caller. `test` may be empty: then validation selects *and* reports, and
    whoever prints a figure says so (`reported_on`).
    """

    train: Rows
    val: Rows
    test: Rows
    carved: bool = (
        False  # val was cut out of the data's own train: what is chosen may be fitted on both
    )

    def __post_init__(self) -> None:
        together = np.concatenate([self.train, self.val, self.test])
        if len(np.unique(together)) != len(together):
            raise PathfmError(
                f"a row is in two of train ({len(self.train):,}), val ({len(self.val):,}) and test "
                f"({len(self.test):,}), or twice in one: a score on it would flatter. Split again"
            )
        for name in ("train", "val"):
            if not len(getattr(self, name)):
                raise PathfmError(f"no row is in {name}: nothing to {_WHY[name]}. Split again")

    @property
    def reported(self) -> Rows:
        """The rows whose score is told: test, or validation where there is no test."""
        return self.test if len(self.test) else self.val

    @property
    def reported_on(self) -> Literal["val", "test"]:
        """The name of that part."""
        return "test" if len(self.test) else "val"

    @staticmethod
    def of_names(
        names: Sequence[str], labels: NDArray[np.int64] | None = None, groups: Sequence[str] = ()
    ) -> Parts:
        """From one of "train", "val" and "test" a row; a row called "" is in no part.

        Where there is a test and no val, a fifth of each class of train becomes val, by whole groups: the
        test never chooses (`carved`; always the same rows, whatever the seed of a run). Public sets whose
        only second part selects and reports call it val themselves, as eva does (MHIST).
        """
        said = np.asarray(names)
        unknown = sorted(set(said.tolist()) - {*SPLITS, ""})
        if unknown:
            raise PathfmError(f"splits {', '.join(unknown)}: only {', '.join(SPLITS)} are known")
        train, val, test = (np.flatnonzero(said == name).astype(np.int64) for name in SPLITS)
        if len(val) or not len(test) or not len(train):
            return Parts(train, val, test)
        own = np.zeros(len(said), np.int64) if labels is None else labels
        try:
            inner = stratified_split(
                own[train],
                CARVED_SHARE,
                0,
                0,
                [groups[i] for i in train.tolist()] if groups else (),
            )
        except PathfmError as error:
            raise PathfmError(
                f"there is train and test, but no val, and none can be cut out of train: {error}. "
                "Name rows that choose val"
            ) from None
        return Parts(train[inner.train], train[inner.test], test, carved=True)


_WHY = {"train": "fit on", "val": "choose by"}


def check_inputs(
    features: NDArray[np.floating], labels: NDArray[np.int64], parts: Parts, n_classes: int
) -> None:
    """`PathfmError` unless a probe can be fitted: sizes agree, numbers are finite, classes are there.

    Every class must have a row in `train`, and `val` and `reported` more than one class.
    """
    n = len(features)
    if features.ndim != 2 or labels.shape != (n,):
        raise PathfmError(
            f"features {features.shape} and labels {labels.shape} do not belong together: "
            "one row and one label a sample"
        )
    rows = np.concatenate([parts.train, parts.val, parts.test])
    if rows.min() < 0 or rows.max() >= n:
        raise PathfmError(f"rows {rows.min():,} to {rows.max():,} of {n:,}: other features' split?")
    used = labels[rows]
    if used.min() < 0 or used.max() >= n_classes:
        raise PathfmError(f"labels {used.min()} to {used.max()} outside 0..{n_classes - 1}")
    bad = int((~np.isfinite(features[rows])).any(axis=1).sum())
    if bad:
        raise PathfmError(
            f"{bad:,} of {len(rows):,} rows have NaN or infinite features: embed again"
        )
    counts = np.bincount(labels[parts.train], minlength=n_classes)
    if n_classes < 2 or (counts == 0).any():
        lacking = ", ".join(map(str, np.flatnonzero(counts == 0).tolist())) or "all but one"
        raise PathfmError(
            f"class {lacking} of {n_classes} has no sample in train: nothing to tell apart. "
            "Add samples, or leave the class out"
        )
    for name, part in (("val", parts.val), (parts.reported_on, parts.reported)):
        if len(np.unique(labels[part])) < 2:
            raise PathfmError(
                f"{name} has samples of one class only: any head would score the same"
            )
