"""Which rows a probe is fitted on, which choose C, and which are corrupted and reported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import words
from pathfm.datasets import Benchmark, open_dataset, stratified_split
from pathfm.probing.parts import Parts
from pathfm.robustness.settings import RobustnessConfig
from pathfm.runtime import PathfmError

Rows = NDArray[np.int64]
_VALIDATION_REPEAT = 1 << 20  # as in `pathfm probe`: attempts from here on split a training half
_STREAM = 422


@dataclass(frozen=True)
class Fold:
    """Row numbers, ascending. With C chosen, the head is solved again on `final`; `test` is reported.

    `test` shares no row with the others, unless the data set has none and reports `choose`.
    """

    fit: Rows
    choose: Rows
    final: Rows
    test: Rows


def open_samples(config: RobustnessConfig) -> Benchmark:
    """The pictures asked for; `PathfmError` for slides and masks, which no probe of patches judges."""
    samples = open_dataset(config.data)
    if samples.facts.task != "classification":
        raise PathfmError(
            f"{samples.name}: a {samples.facts.task} data set; corruptions are measured on labelled patches"
        )
    if config.per_class is None:
        return samples
    keys = words(config.seed, np.arange(len(samples)), 0, _STREAM, 1)[:, 0]
    splits, kept = np.asarray(samples.splits), []
    for split in np.unique(splits):
        for label in range(len(samples.classes)):
            members = np.flatnonzero((samples.labels == label) & (splits == split))
            kept += members[np.argsort(keys[members], kind="stable")][: config.per_class].tolist()
    return samples.subset(np.asarray(sorted(kept), np.int64))


def known_groups(samples: Benchmark) -> tuple[str, ...]:
    """Patient or slide of each picture, () where none is known; an unknown one is a group of its own."""
    if not any(samples.groups):
        return ()
    return tuple(group or f"\0{i}" for i, group in enumerate(samples.groups))


def make_folds(samples: Benchmark, config: RobustnessConfig) -> tuple[list[Fold], bool]:
    """The folds, and whether the rows that choose C are those reported.

    A data set with splits of its own is one fold: fitted on train, C chosen on val, test reported (val
    where it has no test). Others are split `n_splits` times by class, no group torn; then the head is
    solved again on all of the training half.
    """
    if any(samples.splits):
        parts = Parts.of_names(samples.splits, samples.labels, known_groups(samples))
        final = np.union1d(parts.train, parts.val) if parts.carved else parts.train
        fold = Fold(parts.train, parts.val, final, parts.reported)
        return [fold], not len(parts.test)
    groups, found = known_groups(samples), []
    for repeat in range(config.n_splits):
        outer = stratified_split(samples.labels, config.test_share, config.seed, repeat, groups)
        inner = stratified_split(
            samples.labels[outer.train],
            config.validation_share,
            config.seed,
            _VALIDATION_REPEAT + repeat,
            [groups[i] for i in outer.train] if groups else (),
        )
        fit, choose = outer.train[inner.train], outer.train[inner.test]
        found.append(Fold(fit, choose, outer.train, outer.test))
    return found, False
