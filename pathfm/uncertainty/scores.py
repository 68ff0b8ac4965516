"""A model's score with its doubts, and the difference of two models on the same samples.

A metric is a function of sums over groups (confusion tables, or a mean's numerator and denominator), so a
resample is a weighted sum, and thousands of them are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.runtime import PathfmError
from pathfm.uncertainty.intervals import Interval, interval
from pathfm.uncertainty.metrics import METRICS, Metric
from pathfm.uncertainty.options import DEFAULTS, Options
from pathfm.uncertainty.predictions import Ints, Predictions, number_groups
from pathfm.uncertainty.resampling import replicate
from pathfm.uncertainty.sums import Of, Sums, bootstrap, confusion_sums, refuse_few, swap_p

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A metric of one model. `values` are those of each run, `sd` is over runs (n - 1; None for one run).

    `interval` is about the mean over runs and comes from the groups alone: the runs' spread is not in it.
    """

    metric: str
    values: tuple[float, ...]
    sd: float | None
    interval: Interval

    def told(self, scale: float = 100.0, digits: int = 1) -> str:
        """As tables print it: "81.2 [79.0, 83.1], sd 0.4 over 5 runs"."""
        return self.interval.told(scale, digits) + _spread(self.sd, len(self.values), scale, digits)


@dataclass(frozen=True)
class Comparison:
    """Model b minus model a on the same samples; `values` are the differences run by run.

    `p_bootstrap` is two-sided: the level at which the percentile interval begins to hold 0. `p_swap` is
    that of a permutation test: in every resample the two models' predictions are swapped in half of
    the groups, at random; it stays valid with few groups, and with many patches a slide.
    """

    metric: str
    a: str
    b: str
    values: tuple[float, ...]
    sd: float | None
    interval: Interval
    p_bootstrap: float
    p_swap: float

    def told(self, scale: float = 100.0, digits: int = 1) -> str:
        """As tables print it: "+1.3 [0.2, 2.5], p 0.021"."""
        return f"{'+' if self.interval.estimate >= 0 else ''}{self.interval.told(scale, digits)}, p {self.p_swap:.2g}"


def score(
    predictions: Predictions,
    metric: str | Metric = "balanced_accuracy",
    options: Options = DEFAULTS,
) -> Score:
    """The mean over runs of a metric, its interval over groups, and the runs apart.

    metric: a name of METRICS, or a function of confusion tables. Raises PathfmError with fewer than two
    groups, and where the metric has no value.
    """
    name, f = _named(metric)
    of, sums = _of_table(f, predictions.n_classes), confusion_sums(predictions)
    values, rarest = of(sums.total), predictions.groups_of_rarest_class
    made, _ = bootstrap(of, sums, options, n=predictions.n, rarest=rarest)
    return Score(name, tuple(values.tolist()), _sd(values), made)


def compare(
    a: Predictions,
    b: Predictions,
    metric: str | Metric = "balanced_accuracy",
    options: Options = DEFAULTS,
) -> Comparison:
    """b minus a, paired: the same samples and groups in every resample, run by run.

    Raises PathfmError for an unpaired comparison: other samples, other groups, another number of runs, or
    runs that judged other samples.
    """
    refuse_unpaired(a, b)
    name, f = _named(metric)
    one, both, k = _of_table(f, a.n_classes), confusion_sums(a, b), a.n_classes**2

    def of(sums: Floats) -> Floats:
        return one(sums[..., k:]) - one(sums[..., :k])

    values = of(both.total)
    made, replicates = bootstrap(of, both, options, n=a.n, rarest=a.groups_of_rarest_class)
    smaller = min(int((replicates <= 0).sum()), int((replicates >= 0).sum()))
    return Comparison(
        metric=name,
        a=a.name,
        b=b.name,
        values=tuple(values.tolist()),
        sd=_sd(values),
        interval=made,
        p_bootstrap=min(1.0, 2 * (1 + smaller) / (1 + len(replicates))),
        p_swap=swap_p(of, both, options),
    )


def interval_of_mean(
    values: ArrayLike, groups: Sequence[str] = (), options: Options = DEFAULTS
) -> Interval:
    """The mean of one value a sample, such as a Dice score a picture, and its interval over groups.

    values: (n,); NaN says that a sample has none (a class that is not in the picture) and is left out.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or (groups and len(groups) != len(v)):
        raise PathfmError(f"values {v.shape} and {len(groups):,} groups do not belong together")
    if np.isinf(v).any():
        raise PathfmError(f"{int(np.isinf(v).sum()):,} of {len(v):,} values are infinite")
    kept = ~np.isnan(v)
    names = [group for group, keep in zip(groups, kept, strict=False) if keep]
    group_of = number_groups(names, int(kept.sum()))
    n_groups = int(group_of.max(initial=-1)) + 1
    sums = np.zeros((1, n_groups, 2))
    np.add.at(sums[0], group_of, np.stack([v[kept], np.ones(kept.sum())], axis=1))

    def of(s: Floats) -> Floats:
        mean: Floats = s[..., 0] / s[..., 1]
        return mean

    return bootstrap(of, Sums(sums, np.arange(n_groups)), options, n=int(kept.sum()))[0]


def interval_of(
    statistic: Callable[[Ints], float],
    n: int,
    groups: Sequence[str] = (),
    options: Options = DEFAULTS,
) -> Interval:
    """The interval of anything: `statistic(rows)` is called with row numbers, some of them repeated.

    Slower than the others (one call a resample): for AUROC, ECE, a correlation. The statistic of all
    n rows is the estimate; NaN says that a resample has no value.
    """
    if groups and len(groups) != n:
        raise PathfmError(f"{len(groups):,} groups for {n:,} samples")
    group_of = number_groups(groups, n)
    order = np.argsort(group_of, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)

    def of(counts: Floats) -> Floats:
        drawn = (np.repeat(np.arange(len(members)), row.astype(int)) for row in counts)
        return np.array([statistic(np.concatenate([members[g] for g in one])) for one in drawn])

    every = np.arange(len(members))
    refuse_few(len(members))
    estimate = float(statistic(np.arange(n)))
    replicates = replicate(of, every, len(members), options.n_resamples, options.seed)
    left_out = np.ones(len(members)) - np.eye(len(members)) if options.method == "bca" else None
    return interval(
        estimate,
        replicates,
        np.empty(0) if left_out is None else of(left_out),
        level=options.level,
        method=options.method,
        n=n,
        n_groups=len(members),
    )


def refuse_unpaired(a: Predictions, b: Predictions) -> None:
    """PathfmError unless both judged the same samples, of the same groups, in as many runs."""
    why = ""
    if a.n_classes != b.n_classes or not np.array_equal(a.truth, b.truth):
        why = f"{len(a.truth):,} and {len(b.truth):,} samples, or their true classes, are not the same"
    elif a.groups != b.groups:
        why = "their samples are of other groups"
    elif a.runs != b.runs:
        why = f"{a.runs} and {b.runs} runs"
    elif not np.array_equal(a.predicted < 0, b.predicted < 0):
        why = "their runs judged other samples"
    if why:
        raise PathfmError(
            f"an unpaired comparison of {a.name} and {b.name}: {why}. Judge both on the same split, in the same order"
        )


def _of_table(metric: Metric, n_classes: int) -> Of:
    """The metric of flat tables (..., classes ** 2)."""
    return lambda sums: metric(sums.reshape(*sums.shape[:-1], n_classes, n_classes))


def _named(metric: str | Metric) -> tuple[str, Metric]:
    if callable(metric):
        return getattr(metric, "__name__", "metric"), metric
    if metric not in METRICS:
        raise PathfmError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
    return metric, METRICS[metric]


def _sd(values: Floats) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _spread(sd: float | None, runs: int, scale: float, digits: int) -> str:
    return "" if sd is None else f", sd {scale * sd:.{digits}f} over {runs} runs"
