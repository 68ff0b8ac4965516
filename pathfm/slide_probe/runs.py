"""Several runs of the slide protocol: on a table's own splits, or on folds by patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pathfm.heads.folds import grouped_folds, parts_of, told_of
from pathfm.metrics import balanced_accuracy
from pathfm.probing.parts import Parts
from pathfm.slide_probe.bags import Bags
from pathfm.slide_probe.fit import SlideProtocol, fit_run
from pathfm.uncertainty import Interval, Predictions, score


@dataclass(frozen=True, eq=False)
class SlideScores:
    """What several runs found. All scores are balanced accuracies, 0..1.

    values: one a run, on the reported slides; with folds every slide is reported once a run. val: the best
    validation score a run (mean over folds). predicted: (runs, slides) classes, -1 where one is not reported;
    predictions: the same of those that any run reports, with truth and patients.
    interval: of the mean over runs, resampling patients. epochs: of each fit. recall: of each class, mean
    over runs, None for a class that no reported slide has.
    """

    told: str
    values: tuple[float, ...]
    val: tuple[float, ...]
    predicted: NDArray[np.int64]
    predictions: Predictions
    interval: Interval
    epochs: tuple[float, ...]
    recall: tuple[float | None, ...]

    @property
    def n(self) -> int:
        """How many slides are reported."""
        return self.predictions.n

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return float(np.mean(self.values))


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
    values, val, epochs, told = [], [], [], ""
    for run in range(n_runs):
        fits = []
        for k, parts in enumerate(_splits(bags, n_folds, seed, run)):
            told = told_of(parts, n_folds)
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
    reported = Predictions(bags.labels[rows], predicted[:, rows], n_classes, groups)
    return SlideScores(
        told=told,
        values=tuple(values),
        val=tuple(val),
        predicted=predicted,
        predictions=reported,
        interval=score(reported).interval,
        epochs=tuple(epochs),
        recall=_recall(bags, predicted),
    )


def _splits(bags: Bags, n_folds: int | None, seed: int, run: int) -> list[Parts]:
    if n_folds is None:
        return [parts_of(bags.splits, bags.groups, bags.labels, bags.classes)]
    return grouped_folds(bags.groups, n_folds, bags.labels, bags.classes, seed, run)


def _recall(bags: Bags, predicted: NDArray[np.int64]) -> tuple[float | None, ...]:
    """Share of each class's reported slides that was recognised, mean over runs."""
    found: list[float | None] = []
    for k in range(len(bags.classes)):
        asked = (predicted >= 0) & (bags.labels == k)
        runs = [float((p[a] == k).mean()) for p, a in zip(predicted, asked, strict=True) if a.any()]
        found.append(float(np.mean(runs)) if runs else None)
    return tuple(found)
