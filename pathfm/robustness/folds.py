"""Which rows a probe is fitted on, which choose C, and which are corrupted and reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import words
from pathfm.datasets import Benchmark, open_dataset, stratified_split
from pathfm.probing.orders import Balanced
from pathfm.probing.parts import Parts, check_inputs
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


@dataclass(frozen=True)
class Folds:
    """The folds, and who chose C and who is reported: "train" is a part of train that is not fitted on.

    own: the data set's own split. Where both are "val" the reported rows choose, and errors are too small.
    shots: pictures a class that each fold is fitted on, drawn anew; 0: all of train.
    """

    folds: tuple[Fold, ...]
    own: bool
    selected_on: Literal["train", "val"]
    reported_on: Literal["val", "test"]
    shots: int = 0


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


def make_folds(samples: Benchmark, config: RobustnessConfig) -> Folds:
    """Rows by the data set's own split, else by class `n_splits` times, no group torn.

    With splits of its own it is one fold: fitted on train, C chosen on val (without val on a fifth of train),
    test reported (val where it has no test); one that is trained on few pictures a class (`facts.shots`)
    has `n_splits`, each with others of them, those of `pathfm probe`. Where a part of train chose, the head
    is solved again on all of train. Raises `PathfmError` where a fold cannot be fitted or judged: a class
    without training pictures, one class to choose or report by.
    """
    found = _own(samples, config) if any(samples.splits) else _drawn(samples, config)
    blank = np.zeros((len(samples), 1), np.float32)  # of features is nothing known yet
    for fold in found.folds:
        on_test = fold.test if found.reported_on == "test" else fold.test[:0]
        parts = Parts(fold.fit, fold.choose, on_test)
        try:
            check_inputs(blank, samples.labels, parts, len(samples.classes))
        except PathfmError as error:
            raise PathfmError(f"{samples.name}: {error}") from None
    return found


def _own(samples: Benchmark, config: RobustnessConfig) -> Folds:
    parts = Parts.of_names(samples.splits, samples.labels, known_groups(samples))
    selected_on: Literal["train", "val"] = "train" if parts.carved else "val"
    shots = samples.facts.shots
    if shots:
        draws = Balanced(parts.train, samples.labels, shots, config.seed)
        fits = [np.sort(draws.rows(repeat, 0)) for repeat in range(config.n_splits)]
        folds = tuple(Fold(fit, parts.val, fit, parts.reported) for fit in fits)
    else:
        final = np.union1d(parts.train, parts.val) if parts.carved else parts.train
        folds = (Fold(parts.train, parts.val, final, parts.reported),)
    return Folds(folds, True, selected_on, parts.reported_on, shots)


def _drawn(samples: Benchmark, config: RobustnessConfig) -> Folds:
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
    return Folds(tuple(found), False, "train", "test")
