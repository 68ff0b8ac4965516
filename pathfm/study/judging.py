"""From cells' figures to a verdict: differences seed by seed, their intervals, and the study's own criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pathfm.runtime import PathfmError
from pathfm.study.equal import HELD, check_equal
from pathfm.study.metrics import higher_is_better
from pathfm.study.plan import START, Contrast, Criterion, Study, cells_of, start_of

Verdict = Literal["yes", "no", "cannot tell", "not finished"]
Results = Mapping[str, Mapping[str, Any]]
"""Cell name -> what its result.json holds, of the cells that are done."""


@dataclass(frozen=True)
class Difference:
    """Arm less other in a metric, seed by seed, and the interval of its mean. low, high: nan where there is none."""

    arm: str
    against: str
    metric: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    def gain(self) -> tuple[float, float]:
        """The interval with the sign that better is positive."""
        return (self.low, self.high) if higher_is_better(self.metric) else (-self.high, -self.low)

    def answers(self, criterion: Criterion, seeds: int) -> Verdict:
        """yes: all of the gain's interval above the margin; no: all below what matters; else it cannot tell.

        Nor can it where a seed lacks the figure.
        """
        if not self.values:
            return "not finished"
        if len(self.values) < seeds:
            return "cannot tell"
        low, high = self.gain()
        if low > criterion.margin:
            return "yes"
        matters = criterion.margin if criterion.matters is None else criterion.matters
        return "no" if high < matters else "cannot tell"


@dataclass(frozen=True)
class Judged:
    """A study as far as it has come.

    Only `differences` decide, as `answers` says of each. `moved` is each arm less its own start in the same metric:
    whether training did anything there. `beside` has the same contrasts, and those that are only shown, in every
    metric that does not decide; `also` the latter in the one that does.
    """

    verdict: Verdict
    differences: tuple[Difference, ...]
    answers: tuple[Verdict, ...]
    also: tuple[Difference, ...]
    moved: tuple[Difference, ...]
    beside: dict[str, tuple[Difference, ...]]
    values: dict[str, dict[str, list[float]]]  # metric -> arm or start -> a value a seed
    done: int
    cells: int


def judge(study: Study, results: Results) -> Judged:
    """Differences and verdict. `PathfmError` where arms did not see the same after all, or no cell has the metric."""
    held = {
        f"{arm.name} (seed {seed})": _held(results[f"{arm.name}-s{seed}"]["metrics"])
        for arm in study.arms
        for seed in range(study.seeds)
        if f"{arm.name}-s{seed}" in results
    }
    if held:
        check_equal(study, held, "as it came out")
    criterion, cells = study.criterion, [cell.name for cell in cells_of(study)]
    finished = all(name in results for name in cells)
    metrics = dict.fromkeys([criterion.metric, *study.also_shown])
    compared = (*criterion.contrasts, *study.also_compared)

    def differences(contrasts: Sequence[Contrast], metric: str) -> tuple[Difference, ...]:
        return tuple(difference(study, results, each, metric) for each in contrasts)

    decisive = differences(criterion.contrasts, criterion.metric)
    starts = [Contrast(arm=arm.name, against=START) for arm in study.arms]
    moved = differences(starts, criterion.metric) if study.kind == "pretrain" else ()
    if finished and not any(each.values for each in decisive):
        raise PathfmError(
            f"study {study.name}: all cells are done and none has {criterion.metric}: mend criterion.metric"
        )
    answers = tuple(_answer(study, each, moved) for each in decisive)
    others = [name for name in metrics if name != criterion.metric and not name.startswith("run/")]
    return Judged(
        overall(answers) if finished else "not finished",
        decisive,
        answers,
        differences(study.also_compared, criterion.metric),
        moved,
        {name: differences(compared, name) for name in others},
        {name: values_of(study, results, name) for name in metrics},
        sum(name in results for name in cells),
        len(cells),
    )


def _held(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[f"run/{name}"] for name in HELD}


def _answer(study: Study, each: Difference, moved: Sequence[Difference]) -> Verdict:
    """What a difference says; nothing where an arm that should have learnt has not."""
    said = each.answers(study.criterion, study.seeds)
    return "cannot tell" if idle(study, each, moved) else said


def idle(study: Study, each: Difference, moved: Sequence[Difference]) -> str:
    """The arm that made a difference say nothing, for training did not make it better than its start; "" if none.

    Not to be worse than an arm that learnt nothing is easy; and one that learnt nothing can gain nothing.
    """
    criterion, said = study.criterion, each.answers(study.criterion, study.seeds)
    arm = ""
    if said == "yes" and criterion.margin < 0:
        arm = each.against
    if said == "no" and each.gain()[1] >= criterion.margin:  # no loss, only too small a gain
        arm = each.arm
    return "" if learnt(arm, moved) else arm


def learnt(arm: str, moved: Sequence[Difference]) -> bool:
    """Whether training made an arm better than its start, by the whole interval; True where no start is known."""
    found = [each for each in moved if each.arm == arm and each.values]
    return all(each.gain()[0] > 0 for each in found)


def overall(answers: Sequence[Verdict]) -> Verdict:
    """yes when every contrast says yes, no when one says no, else it cannot tell."""
    if all(word == "yes" for word in answers):
        return "yes"
    return "no" if "no" in answers else "cannot tell"


def values_of(study: Study, results: Results, metric: str) -> dict[str, list[float]]:
    """The metric's values of each arm, by seed, and of each start, of cells that have it."""
    found: dict[str, list[float]] = {arm.name: [] for arm in study.arms}
    for cell in cells_of(study):
        value = _value(results, cell.name, metric)
        if value is not None:
            name = cell.arm.name if cell.arm else cell.start.removesuffix(f"-s{cell.seed}")
            found.setdefault(name, []).append(value)
    return found


def difference(study: Study, results: Results, contrast: Contrast, metric: str) -> Difference:
    """Two arms on the seeds that both have, or an arm and the weights that it began with."""
    pairs, arm = [], study.arm(contrast.arm)
    for seed in range(study.seeds):
        ours = _value(results, f"{arm.name}-s{seed}", metric)
        start = start_of(study, arm, seed).name
        other = start if contrast.against == START else f"{contrast.against}-s{seed}"
        theirs = _value(results, other, metric)
        if ours is not None and theirs is not None:
            pairs.append(ours - theirs)
    return summed(contrast.arm, contrast.against, metric, pairs, study.criterion.level)


def _value(results: Results, cell: str, metric: str) -> float | None:
    found = results.get(cell, {}).get("metrics", {}).get(metric)
    return None if found is None else float(found)


def summed(arm: str, against: str, metric: str, pairs: Sequence[float], level: float) -> Difference:
    """Mean and Student's interval of paired differences: mean ± t(level, n - 1) sd / sqrt(n).

    Over seeds of pretraining alone: the labelled pictures are the same for all. No interval for one
    pair, nor for pairs that are all equal: they tell nothing of chance.
    """
    mean = float(np.mean(pairs)) if pairs else math.nan
    sd = float(np.std(pairs, ddof=1)) if len(pairs) > 1 else 0.0
    if sd == 0:
        return Difference(arm, against, metric, tuple(pairs), mean, math.nan, math.nan)
    from scipy.stats import t  # late: --help starts sooner

    half = float(t.ppf((1 + level) / 2, len(pairs) - 1)) * sd / math.sqrt(len(pairs))
    return Difference(arm, against, metric, tuple(pairs), mean, mean - half, mean + half)
