"""Counts of right answers -> errors, mCE, relative mCE, and intervals over slides or patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.measures import CorruptionErrors, corruption_errors
from pathfm.measures.corruption_error import LEAST
from pathfm.robustness.judging import Judged
from pathfm.runtime import PathfmError
from pathfm.uncertainty import Interval, Options
from pathfm.uncertainty.predictions import number_groups
from pathfm.uncertainty.sums import Sums, bootstrap

Floats = NDArray[np.float64]
_Of = Callable[[Floats, Floats], Floats]
"""(errors, the reference's), both (..., 1 + corruptions), clean first -> (...)."""


@dataclass(frozen=True, eq=False)
class Summed:
    """A model beside the reference: errors (corruptions, severities), CE, and intervals.

    clean, error: balanced error with the answers of all splits pooled, which is the mean over splits where
    these test equally many of a class.
    """

    clean: float
    error: Floats
    ce: CorruptionErrors
    clean_interval: Interval | None
    unnormalised_interval: Interval | None
    mce_interval: Interval | None
    relative_interval: Interval | None
    no_interval: tuple[str, ...]  # why, where one is None and its figure is not


def summed(
    model: Judged,
    reference: Judged,
    labels: NDArray[np.int64],
    n_classes: int,
    groups: Sequence[str],
    n_corruptions: int,
    options: Options,
) -> Summed:
    """Errors of `model`, and its CE as a share of `reference`'s, on the same tested rows.

    labels, groups: of these rows. Intervals are over groups, paired: every resample has the same
    groups for both. A corruption that the guards leave out is left out of every resample.
    """
    tables = [
        pooled_errors(each.right, each.times, labels, n_classes) for each in (model, reference)
    ]
    (clean, error), (clean_ref, error_ref) = (
        (float(table[0]), table[1:].reshape(n_corruptions, -1)) for table in tables
    )
    ce = corruption_errors(error, clean, error_ref, clean_ref)
    parts = _group_sums(model, reference, labels, groups, n_corruptions, n_classes)

    reasons: list[str] = []

    def interval(what: str, of: _Of) -> Interval | None:
        def value(sums: Floats) -> Floats:
            with np.errstate(invalid="ignore", divide="ignore"):
                return of(*_errors_of(sums, n_corruptions, n_classes))

        try:
            return bootstrap(value, parts, options, n=len(labels))[0]
        except PathfmError as error:  # too few groups, or a ratio whose denominator can vanish
            reasons.append(f"{what}: {error}")
            return None

    def ratio(
        what: str, of: Callable[[Floats], Floats], used: NDArray[np.bool_]
    ) -> Interval | None:
        def percent(e: Floats, r: Floats) -> Floats:
            part, whole = of(e)[..., used], of(r)[..., used]
            mean = 100 * (part / whole).mean(axis=-1)
            # past the guard in a resample a ratio is a matter of luck: such resamples have no value
            return np.asarray(np.where((whole < LEAST).any(axis=-1), np.nan, mean))

        return interval(what, percent) if used.any() else None

    return Summed(
        clean,
        error,
        ce,
        clean_interval=interval("clean error", lambda e, _: e[..., 0]),
        unnormalised_interval=interval("corrupted error", lambda e, _: e[..., 1:].mean(axis=-1)),
        mce_interval=ratio("mCE", lambda e: e[..., 1:], ce.used),
        relative_interval=ratio("relative mCE", _rise, ce.relative_used),
        no_interval=tuple(reasons),
    )


def pooled_errors(
    right: NDArray[np.int64], times: NDArray[np.int64], labels: NDArray[np.int64], n_classes: int
) -> Floats:
    """Balanced error of each case, (cases,): 1 - mean over classes of (right answers / answers)."""
    member = np.eye(n_classes)[labels]  # (m, classes)
    asked = times @ member
    recall = (member.T @ right)[asked > 0] / asked[asked > 0, None]
    errors: Floats = 1.0 - recall.mean(axis=0)
    return errors


def _group_sums(
    model: Judged,
    reference: Judged,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    n_corruptions: int,
    n_classes: int,
) -> Sums:
    """For each group: answers asked by class; right ones by class of each model, clean and by corruption.

    Severities are added up: a mean over them of balanced errors needs no more.
    """
    group_of = number_groups(groups, len(labels))
    facts = []
    for each in (model, reference):
        severe = each.right[:, 1:].reshape(len(labels), n_corruptions, -1)
        share = np.concatenate([each.right[:, :1], severe.mean(axis=2)], axis=1)
        facts.append(share)
    values = np.concatenate([model.times[:, None], *facts], axis=1)  # (m, 1 + 2 (1 + corruptions))
    n_groups = int(group_of.max()) + 1
    sums = np.zeros((n_groups * n_classes, values.shape[1]))
    np.add.at(sums, group_of * n_classes + labels, values)
    by_class_last = sums.reshape(n_groups, n_classes, -1).swapaxes(1, 2)
    return Sums(by_class_last.reshape(1, n_groups, -1), np.arange(n_groups))


def _errors_of(sums: Floats, n_corruptions: int, n_classes: int) -> tuple[Floats, Floats]:
    """Balanced errors (..., 1 + corruptions) of model and reference out of group sums."""
    parts = sums.reshape(*sums.shape[:-1], 3 + 2 * n_corruptions, n_classes)
    recall = np.nanmean(parts[..., 1:, :] / parts[..., :1, :], axis=-1)
    half = 1 + n_corruptions
    return 1.0 - recall[..., :half], 1.0 - recall[..., half:]


def _rise(errors: Floats) -> Floats:
    return errors[..., 1:] - errors[..., :1]
