"""What a probe answers -> scores, calibration, intervals; all together and by µm/px; two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pathfm.embeddings import Embeddings
from pathfm.measures import calibration
from pathfm.metrics import confusion_matrix, recall_per_class
from pathfm.probing.parts import Rows
from pathfm.runtime import PathfmError, one_line
from pathfm.uncertainty import Predictions, mcnemar
from pathfm.uncertainty import compare as compare_predictions
from pathfm.uncertainty import score as score_predictions

MOST_MPPS = 12
"""More different µm/px than this are no table any more."""

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """One probe of one backbone: balanced accuracy (0..1) of every repeat, and what is behind it.

    A repeat is a split of the data, or with eva's heads, and on a data set's own splits, a run.
    """

    values: list[float]
    mean: float
    sd: float  # over repeats, n - 1 in the denominator; 0 for one
    recall: list[float | None]  # mean over repeats, one a class; None: none of it was reported
    confusion: list[list[int]]  # summed over repeats; row = true class
    c: list[float]  # chosen inverse L2 strength of each repeat; [] where there is none
    interval: list[float] | None = None  # of the mean: low, high, over groups; None: there is none
    interval_of: str = ""  # what was resampled: "groups" or "pictures"
    interval_note: str = ""  # why there is none, or why not to trust it
    learning_rate: float | None = None  # eva: what validation chose
    n_groups: int = 0  # groups (patients, else slides; else pictures) that the reported rows are of
    ece: list[float] = field(default_factory=list)  # calibration error (0..1) of every repeat
    overconfidence: list[float] = field(default_factory=list)  # confidence minus accuracy of each

    @property
    def mean_ece(self) -> float:
        """Its mean over repeats; NaN in results of earlier versions."""
        return float(np.mean(self.ece)) if self.ece else float("nan")


@dataclass(frozen=True)
class MppScores:
    """The reported rows at one µm/px of the input: how many, and each probe's scores on them alone."""

    mpp: float
    n: int
    probes: dict[str, Scores]


@dataclass(frozen=True, eq=False)
class Answers:
    """What one probe says of the rows it is judged on, repeat by repeat.

    rows: (m,) of each repeat. classes: (m,) int64 of each. shares: (m, classes), what it thinks each class
    is worth, rows summing to 1: softmax, or shares of the votes. c, rate: what validation chose.
    """

    rows: Sequence[Rows]
    classes: Sequence[NDArray[np.int64]]
    shares: Sequence[Shares]
    c: tuple[float, ...] = ()
    rate: float | None = None

    def predictions(self, data: Embeddings) -> Predictions:
        """The classes as (repeats, n), -1 where a repeat did not judge a row."""
        table = np.full((len(self.rows), len(data.labels)), -1, np.int64)
        for repeat, (rows, classes) in enumerate(zip(self.rows, self.classes, strict=True)):
            table[repeat, rows] = classes
        return Predictions(data.labels, table, len(data.classes), data.groups, data.info.name)

    def among(self, chosen: NDArray[np.bool_]) -> Answers:
        """Those on rows that are `chosen` (n,)."""
        kept = [chosen[rows] for rows in self.rows]
        return replace(
            self,
            rows=[rows[keep] for rows, keep in zip(self.rows, kept, strict=True)],
            classes=[told[keep] for told, keep in zip(self.classes, kept, strict=True)],
            shares=[part[keep] for part, keep in zip(self.shares, kept, strict=True)],
        )


def scores_of(answers: Answers, data: Embeddings) -> Scores:
    """All figures of one probe."""
    made = answers.predictions(data)
    tables = [
        confusion_matrix(data.labels[rows], classes, made.n_classes)
        for rows, classes in zip(answers.rows, answers.classes, strict=True)
    ]
    recall = [recall_per_class(table) for table in tables]
    values = [float(np.nanmean(each)) for each in recall]
    judged = [
        calibration(shares, data.labels[rows])
        for rows, shares in zip(answers.rows, answers.shares, strict=True)
    ]
    interval, note = interval_of(made)
    return Scores(
        values=values,
        mean=float(np.mean(values)),
        sd=sd_of(values),
        recall=_mean_recall(recall),
        confusion=np.sum(tables, axis=0).tolist(),
        c=list(answers.c),
        interval=interval,
        interval_of="groups" if made.groups else "pictures",
        interval_note=note,
        learning_rate=answers.rate,
        n_groups=made.n_groups,
        ece=[one.ece for one in judged],
        overconfidence=[one.overconfidence for one in judged],
    )


def by_mpp(answers: dict[str, Answers], data: Embeddings) -> list[MppScores]:
    """The scores at each µm/px of the input, finest first; [] where rows do not differ in it.

    Rows of unknown µm/px are in none of them, and neither is a µm/px that some repeat has no reported
    row at. Fitted are all µm/px together. More than MOST_MPPS are no table: [] as well.
    """
    if data.mpp is None:
        return []
    told = np.unique(data.mpp[np.isfinite(data.mpp)])
    if not 1 < len(told) <= MOST_MPPS:
        return []
    found = []
    for mpp in told:
        chosen = data.mpp == mpp
        cut = {probe: each.among(chosen) for probe, each in answers.items()}
        if all(len(rows) for each in cut.values() for rows in each.rows):
            first = next(iter(cut.values()))
            n = len(np.unique(np.concatenate(list(first.rows))))
            found.append(
                MppScores(float(mpp), n, {p: scores_of(each, data) for p, each in cut.items()})
            )
    return found


@dataclass(frozen=True)
class Paired:
    """Other minus baseline, repeat by repeat, in balanced accuracy."""

    baseline: str
    other: str
    probe: str
    differences: list[float]
    mean: float
    sd: float
    no_worse: (
        bool  # mean of other >= mean of baseline - its sd; of one repeat: the interval reaches 0
    )
    interval: list[float] | None = None  # of the mean difference, paired; None: there is none
    p: float | None = None  # of no difference: predictions swapped group by group
    mcnemar_p: float | None = (
        None  # exact; of one repeat whose pictures are each a group of their own
    )


def paired_scores(baseline: tuple[str, Scores], other: tuple[str, Scores], probe: str) -> Paired:
    """Other minus baseline on the same repeats; each a name and its scores."""
    (name, a), (other_name, b) = baseline, other
    differences = [y - x for x, y in zip(a.values, b.values, strict=True)]
    return Paired(
        baseline=name,
        other=other_name,
        probe=probe,
        differences=differences,
        mean=float(np.mean(differences)),
        sd=sd_of(differences),
        no_worse=b.mean >= a.mean - a.sd,
    )


def with_interval(plain: Paired, baseline: Predictions, other: Predictions) -> Paired:
    """The same with the interval of the difference, and how surprising it is; without where there is none.

    Of one repeat there is no sd: what tells whether the other is worse is the interval.
    """
    try:
        found = compare_predictions(baseline, other)
    except PathfmError:  # too few groups: the scores' own note says so
        return plain
    low, high = found.interval.low, found.interval.high
    told = replace(plain, interval=[low, high], p=found.p_swap)
    if len(plain.differences) > 1:
        return told
    judged = baseline.predicted[0] >= 0
    alone = baseline.n_groups == int(judged.sum())
    test = mcnemar(
        baseline.truth[judged], baseline.predicted[0, judged], other.predicted[0, judged]
    )
    return replace(told, no_worse=high >= 0, mcnemar_p=test.p_exact if alone else None)


def interval_of(made: Predictions) -> tuple[list[float] | None, str]:
    """Low and high, and what a reader must know; no interval where the groups are too few for one."""
    try:
        found = score_predictions(made).interval
    except PathfmError as error:
        return None, one_line(error)
    return [found.low, found.high], " ".join(found.caveats)


def sd_of(values: Sequence[float]) -> float:
    """The standard deviation, n - 1 in the denominator; 0 for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _mean_recall(recall: Sequence[NDArray[np.float64]]) -> list[float | None]:
    """Over the repeats that report the class; None for a class that none of them reports."""
    table = np.array(recall)
    there = np.isfinite(table)
    total = np.where(there, table, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    reported: list[bool] = np.asarray(there.any(axis=0)).tolist()
    return [float(x) if some else None for x, some in zip(total, reported, strict=True)]
