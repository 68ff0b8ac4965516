"""From cells' figures to a verdict: differences seed by seed, their intervals, and the study's own criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pathfm.study.equal import check_equal
from pathfm.study.plan import START, Contrast, Criterion, Study, settings_of

Verdict = Literal["yes", "no", "cannot tell", "not finished"]
Results = Mapping[str, Mapping[str, Any]]
"""Cell name -> what its result.json holds, of the cells that are done."""


@dataclass(frozen=True)
class Difference:
    """Arm minus other in a metric, seed by seed, and the interval of its mean; better is positive.

    Where lower is better the sign is turned. low, high: nan for one pair.
    """

    arm: str
    against: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    sd: float

    def answers(self, margin: float) -> Verdict:
        """yes: all of the interval above the margin; no: all below; else it cannot tell."""
        if not self.values:
            return "not finished"
        if self.low > margin:
            return "yes"
        return "no" if self.high < margin else "cannot tell"


@dataclass(frozen=True)
class Judged:
    """A study as far as it has come.

    Only `differences` decide. `moved` is each arm that began with the start's weights less the start, in the
    same metric: whether training did anything there. `beside` has the same contrasts in the further metrics,
    signs as they are.
    """

    verdict: Verdict
    differences: tuple[Difference, ...]
    moved: tuple[Difference, ...]
    beside: dict[str, tuple[Difference, ...]]
    values: dict[str, dict[str, list[float]]]  # metric -> arm -> a value a seed
    start: dict[str, float]  # metric -> the start's
    done: int
    cells: int


def judge(study: Study, results: Results) -> Judged:
    """Differences and verdict. `PathfmError` where arms did not see the same after all."""
    facts = {
        f"{arm.name} (seed {seed})": _held(results[f"{arm.name}-s{seed}"]["metrics"])
        for arm in study.arms
        for seed in range(study.seeds)
        if f"{arm.name}-s{seed}" in results
    }
    if facts:
        check_equal(study, facts, "as it came out")
    metrics = dict.fromkeys([study.criterion.metric, *study.also_shown])
    values = {metric: values_of(study, results, metric) for metric in metrics}
    start = results.get(START, {}).get("metrics", {})
    criterion = study.criterion
    differences = [difference(study, results, each, criterion) for each in criterion.contrasts]
    began_there = [arm.name for arm in study.arms if "weights" not in settings_of(study, arm)]
    from_start = [Contrast(arm=name, against=START) for name in began_there if START in results]
    beside = {
        metric: tuple(
            difference(study, results, each, _plainly(criterion, metric))
            for each in criterion.contrasts
        )
        for metric in metrics
        if metric != criterion.metric and not metric.startswith("run/")
    }
    n_cells = study.seeds * len(study.arms) + (study.kind == "pretrain")
    unfinished = len(results) < n_cells
    verdict = "not finished" if unfinished else overall(differences, study.criterion.margin)
    return Judged(
        verdict,
        tuple(differences),
        tuple(difference(study, results, each, criterion) for each in from_start),
        beside,
        values,
        {m: start[m] for m in metrics if m in start},
        len(results),
        n_cells,
    )


def _plainly(criterion: Criterion, metric: str) -> Criterion:
    """The same for a metric that is looked at and does not decide."""
    return criterion.model_copy(update={"metric": metric, "higher_is_better": True})


def _held(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("patches_seen", "optimizer_steps", "views_seen")
    return {name: metrics[f"run/{name}"] for name in names}


def overall(differences: Sequence[Difference], margin: float) -> Verdict:
    """yes when every contrast says yes, no when one says no, else it cannot tell."""
    said = [each.answers(margin) for each in differences]
    if all(word == "yes" for word in said):
        return "yes"
    return "no" if "no" in said else "cannot tell"


def values_of(study: Study, results: Results, metric: str) -> dict[str, list[float]]:
    """The metric's values of each arm, by seed, of cells that have it."""
    found: dict[str, list[float]] = {}
    for arm in study.arms:
        cells = [results.get(f"{arm.name}-s{seed}") for seed in range(study.seeds)]
        found[arm.name] = [
            float(c["metrics"][metric]) for c in cells if c is not None and metric in c["metrics"]
        ]
    return found


def difference(
    study: Study, results: Results, contrast: Contrast, criterion: Criterion
) -> Difference:
    """Two arms on the seeds that both have; the start is the same at every seed."""
    sign, pairs = (1.0 if criterion.higher_is_better else -1.0), []
    for seed in range(study.seeds):
        ours = _value(results, f"{contrast.arm}-s{seed}", criterion.metric)
        other = START if contrast.against == START else f"{contrast.against}-s{seed}"
        theirs = _value(results, other, criterion.metric)
        if ours is not None and theirs is not None:
            pairs.append(sign * (ours - theirs))
    return summed(contrast.arm, contrast.against, pairs, criterion.level)


def _value(results: Results, cell: str, metric: str) -> float | None:
    found = results.get(cell, {}).get("metrics", {}).get(metric)
    return None if found is None else float(found)


def summed(arm: str, against: str, pairs: Sequence[float], level: float) -> Difference:
    """Mean, sd and Student's interval of paired differences: mean ± t(level, n - 1) sd / sqrt(n).

    Over seeds of pretraining alone: the labelled pictures are the same for all. No interval for one
    pair; equal pairs have one of width 0.
    """
    if not pairs:
        return Difference(arm, against, (), math.nan, math.nan, math.nan, math.nan)
    mean = float(np.mean(pairs))
    if len(pairs) == 1:
        return Difference(arm, against, tuple(pairs), mean, math.nan, math.nan, math.nan)
    from scipy.stats import t  # late: --help starts sooner

    sd = float(np.std(pairs, ddof=1))
    half = float(t.ppf((1 + level) / 2, len(pairs) - 1)) * sd / math.sqrt(len(pairs))
    return Difference(arm, against, tuple(pairs), mean, mean - half, mean + half, sd)
