"""Several runs of the slide protocol: on a table's own splits, or on folds by patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pathfm.metrics import balanced_accuracy
from pathfm.slide_probe.bags import Bags
from pathfm.slide_probe.fit import SlideProtocol, SlideRun, fit_run
from pathfm.slide_probe.folds import Parts, grouped_folds, parts_of
from pathfm.uncertainty import Interval, Predictions, score


@dataclass(frozen=True, eq=False)
class SlideScores:
    """What several runs found. All scores are balanced accuracies, 0..1.

    values: one a run, on the reported slides; with folds every slide is reported once a run. val: the best
    validation score a run (mean over folds). predicted: (runs, n) classes, -1 where a slide is not reported.
    interval: of the mean over runs, resampling patients. epochs: mean length of a fit.
    """

    told: str
    values: tuple[float, ...]
    val: tuple[float, ...]
    predicted: NDArray[np.int64]
    interval: Interval
    n: int
    epochs: float

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Standard deviation over runs, n - 1 below the line; 0 for one run."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


def probe_bags(
    bags: Bags,
    protocol: SlideProtocol,
    n_runs: int = 20,
    n_folds: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    advance: Callable[[int], object] | None = None,
) -> SlideScores:
    """Fits `n_runs` heads on the bags' own splits or, with `n_folds`, every fold in each of them.

    Run r draws its initial heads, batches and folds from (seed, r). advance is told of each fit. Raises
    PathfmError where a split or a fold cannot be made, and as `fit_run` does.
    """
    if protocol.pooling == "mean":  # the means are all that is ever used
        means = bags.means()
        bags = replace(bags, source=lambda i: means[i : i + 1])
    n_classes = len(bags.classes)
    predicted = np.full((n_runs, len(bags)), -1, np.int64)
    values, val, epochs = [], [], []
    for run in range(n_runs):
        fits = []
        for k, parts in enumerate(_splits(bags, n_folds, seed, run)):
            number = run * (n_folds or 1) + k
            fits.append(fit_run(bags, parts, protocol, seed=seed, run=number, device=device))
            predicted[run, fits[-1].rows] = fits[-1].probabilities.argmax(1)
            if advance is not None:
                advance(1)
        judged = predicted[run] >= 0
        values.append(balanced_accuracy(bags.labels[judged], predicted[run, judged], n_classes))
        val.append(float(np.mean([fit.val for fit in fits])))
        epochs += [fit.epochs for fit in fits]
    rows = np.flatnonzero((predicted >= 0).any(axis=0))
    groups = [bags.groups[i] for i in rows]
    found = score(Predictions(bags.labels[rows], predicted[:, rows], n_classes, groups))
    return SlideScores(
        told=_told(n_folds, fits[-1]),
        values=tuple(values),
        val=tuple(val),
        predicted=predicted,
        interval=found.interval,
        n=len(rows),
        epochs=float(np.mean(epochs)),
    )


def _splits(bags: Bags, n_folds: int | None, seed: int, run: int) -> list[Parts]:
    if n_folds is None:
        return [parts_of(bags.splits, bags.labels, bags.groups, bags.classes)]
    return grouped_folds(bags.labels, bags.groups, bags.classes, n_folds, seed, run)


def _told(n_folds: int | None, fit: SlideRun) -> str:
    """Which slides are reported, and what chose the epoch."""
    if n_folds is not None:
        return f"{n_folds} folds by patient (another fold chose the epoch)"
    return "val (it chose the epoch too)" if fit.test is None else "test (val chose the epoch)"
