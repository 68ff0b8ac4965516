"""Sums over groups, from which every resample of a metric is one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.runtime import PathfmError
from pathfm.uncertainty.intervals import FEW_GROUPS, Interval, interval
from pathfm.uncertainty.options import Options
from pathfm.uncertainty.predictions import Ints, Predictions
from pathfm.uncertainty.resampling import draw_swaps, in_blocks, replicate

Floats = NDArray[np.float64]
Of = Callable[[Floats], Floats]
"""A metric of sums: (..., k) -> (...)."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the samples of each kind of group, (runs, kinds, k), and each group's kind (groups,).

    A kind is shared by groups of one content: of 300,000 patches that are groups of their own there are
    only as many kinds as ways to be judged.
    """

    sums: Floats
    kind_of: Ints

    @property
    def total(self) -> Floats:
        """Over all groups, (runs, k)."""
        n_of = np.bincount(self.kind_of, minlength=self.sums.shape[1]).astype(np.float64)
        total: Floats = n_of @ self.sums
        return total


def confusion_sums(first: Predictions, *others: Predictions) -> Sums:
    """Confusion tables, flat, of several models behind each other: k = models x classes ** 2.

    All must have judged the same samples.
    """
    rows = np.flatnonzero(first.group_of >= 0)
    group_of, truth, k = first.group_of[rows], first.truth[rows], first.n_classes**2
    judged = np.stack([each.predicted[:, rows] for each in (first, *others)])
    kind_of = np.arange(first.n_groups)
    if first.n_groups == len(rows):  # each a group of its own: alike where all classes are
        facts = np.concatenate([truth[None], judged.reshape(-1, len(rows))]).T
        kinds, kind_of = np.unique(facts, axis=0, return_inverse=True)
        kind_of, truth, group_of = kind_of.ravel(), kinds[:, 0], np.arange(len(kinds))
        judged = kinds[:, 1:].T.reshape(*judged.shape[:2], len(kinds))
    sums = np.zeros((first.runs, int(group_of.max()) + 1, k * len(judged)))
    for model, runs in enumerate(judged):
        for run, classes in enumerate(runs):
            seen = classes >= 0
            cell = model * k + truth[seen] * first.n_classes + classes[seen]
            np.add.at(sums[run], (group_of[seen], cell), 1.0)
    return Sums(sums, kind_of)


def bootstrap(
    of: Of, sums: Sums, options: Options, *, n: int, rarest: int = 0
) -> tuple[Interval, Floats]:
    """The interval of the mean over runs of a metric of sums, and the replicates behind it."""
    n_groups, n_kinds = len(sums.kind_of), sums.sums.shape[1]
    refuse_few(n_groups)

    def statistic(counts: Floats) -> Floats:
        return np.asarray(of(counts @ sums.sums).mean(axis=0))

    replicates = replicate(statistic, sums.kind_of, n_kinds, options.n_resamples, options.seed)
    total, jackknife = sums.total, np.empty(0)
    if options.method == "bca":
        without = np.asarray(of(total[:, None] - sums.sums).mean(axis=0))
        jackknife = without[sums.kind_of]
    made = interval(
        float(of(total).mean()),
        replicates,
        jackknife,
        level=options.level,
        method=options.method,
        n=n,
        n_groups=n_groups,
        groups_of_rarest_class=rarest,
    )
    return made, replicates


def swap_p(of: Of, both: Sums, options: Options) -> float:
    """Two-sided p of a difference when whole groups change sides, each by a fair coin.

    `both.sums` holds two models' sums behind each other. The share of resamples whose difference is at
    least as far from 0 as the one found, which itself counts as one (Phipson and Smyth 2010, eq. 2).
    """
    k = both.sums.shape[-1] // 2
    apart = both.sums[..., k:] - both.sums[..., :k]
    moved = np.concatenate([apart, -apart], axis=-1)
    order = np.argsort(both.kind_of, kind="stable")
    starts = np.flatnonzero(np.diff(both.kind_of[order], prepend=-1))
    total, found, as_far = both.total, abs(float(of(both.total).mean())), 0
    for block in in_blocks(options.n_resamples, len(order)):
        coins = draw_swaps(options.seed, block, len(order))
        swapped = np.add.reduceat(coins, starts, axis=1)  # of each kind; which ones does not matter
        differences = of(total[:, None] + swapped @ moved).mean(axis=0)
        as_far += int((np.abs(differences) >= found - 1e-12).sum())
    return (1 + as_far) / (1 + options.n_resamples)


def refuse_few(n_groups: int) -> None:
    """PathfmError where there is nothing to resample."""
    if n_groups < 2:
        raise PathfmError(
            f"no interval: what is tested is of {n_groups} patient{'' if n_groups == 1 else 's'} or slide"
            f"{'' if n_groups == 1 else 's'}, and an interval draws them anew: test on at least 2, better {FEW_GROUPS}"
        )
