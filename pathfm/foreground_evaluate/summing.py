"""Many rows as few numbers: means with intervals, worst pictures, differences, targets.

Intervals are 95 % percentile bootstrap intervals over *sources* (slides or cases), all pictures of a
source together: pictures of one slide are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pathfm.foreground_evaluate.measuring import Row, Subject
from pathfm.segmentation.scores import HIGHER_IS_BETTER, count
from pathfm.segmentation.truth import INSIDE, OUTSIDE

ENOUGH_DICE, BELOW_AGREEMENT = 0.95, 0.02
ENOUGH_OUTSIDE, ENOUGH_INSIDE, STAIN_GAP = 0.95, 0.97, 0.03


@dataclass(frozen=True)
class Score:
    """One score over all pictures; NaN where no picture has it."""

    mean: float
    low: float
    high: float
    worst: float
    worst_picture: str


@dataclass(frozen=True)
class MethodSummary:
    """How a method did."""

    is_model: bool
    scores: Mapping[str, Score]
    groups: Mapping[str, Mapping[str, float]]
    """score -> stain group -> mean over its pictures"""
    inside: Mapping[str, float]
    """kind -> share of all its pixels that lie inside the mask, pictures pooled"""
    dice: Mapping[str, float]
    """picture -> Dice"""


@dataclass(frozen=True)
class Difference:
    """Dice of a model minus that of the best threshold, picture by picture."""

    model: str
    threshold: str
    mean: float
    low: float
    high: float
    better_on: int
    pictures: int


@dataclass(frozen=True)
class Target:
    """One thing the issue asks of a model; `met` is None where nothing of the kind is drawn."""

    method: str
    name: str
    met: bool | None
    said: str


@dataclass(frozen=True)
class Summary:
    """Everything about one kind of pictures, "drawn" or "synthetic"."""

    data: str
    pictures: int
    sources: int
    methods: Mapping[str, MethodSummary]
    kind_px: Mapping[str, int]
    best_threshold: str
    """By mean Dice; "" without thresholds."""
    differences: tuple[Difference, ...] = ()
    agreement: Mapping[str, float] = field(default_factory=dict)
    """picture -> Dice of its two drawings"""
    targets: tuple[Target, ...] = ()

    @property
    def agreement_mean(self) -> float:
        """The drawer's mean Dice with themself; NaN where nothing was drawn twice."""
        return _mean(list(self.agreement.values()))


def agreement(subjects: Sequence[Subject]) -> dict[str, float]:
    """Dice of the two drawings of each picture that has two; what either ignores is left out."""
    found = {}
    for subject in subjects:
        if subject.again is not None:
            ignore = subject.truth.ignore | subject.again.ignore
            found[subject.name] = count(subject.again.tissue, subject.truth.tissue, ignore).dice
    return found


def summarise(
    rows: Sequence[Row],
    models: Sequence[str],
    agreed: Mapping[str, float],
    seed: int,
    resamplings: int,
) -> Summary | None:
    """The summary of rows of one kind of pictures, every method on every picture; None for none."""
    if not rows:
        return None
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    first = next(iter(by_method.values()))
    draws = _draws([row.source for row in first], seed, resamplings)
    methods = {name: _method(mine, name in models, draws) for name, mine in by_method.items()}
    thresholds = [name for name in methods if name not in models]
    best = max(thresholds, key=lambda n: methods[n].scores["dice"].mean, default="")
    kind_px = {k: sum(row.scores.kind_px[k] for row in first) for k in (*INSIDE, *OUTSIDE)}
    differences = [
        _difference(model, best, by_method, draws) for model in models if model in methods and best
    ]
    drawn = first[0].drawn
    summary = Summary(
        "drawn" if drawn else "synthetic",
        len(first),
        len({row.source for row in first}),
        methods,
        kind_px,
        best,
        tuple(differences),
        agreed,
    )
    if not drawn:
        return summary
    targets = [target for model in models for target in _targets(model, summary)]
    return Summary(**{**summary.__dict__, "targets": tuple(targets)})


def _draws(sources: Sequence[str], seed: int, resamplings: int) -> NDArray[np.float64]:
    """(resamplings, pictures): how often each picture is in each resampling of the sources."""
    names = sorted(set(sources))
    belongs = np.array([names.index(source) for source in sources])
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0xB007], np.uint64)))
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamplings)
    return np.asarray(times[:, belongs], np.float64)


def interval(values: Sequence[float], draws: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile interval of the mean of values under the draws; NaN values take no part."""
    array = np.array(values)
    known = np.isfinite(array)
    weights = draws[:, known]
    total = weights.sum(axis=1)
    if not known.any():
        return math.nan, math.nan
    means = (weights @ array[known])[total > 0] / total[total > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _method(rows: Sequence[Row], is_model: bool, draws: NDArray[np.float64]) -> MethodSummary:
    scores, groups = {}, {}
    for name, higher in HIGHER_IS_BETTER.items():
        values = [float(getattr(row.scores, name)) for row in rows]
        known = [i for i, value in enumerate(values) if math.isfinite(value)]
        worst = (min if higher else max)(known, key=lambda i: values[i], default=None)
        scores[name] = Score(
            _mean(values),
            *interval(values, draws),
            math.nan if worst is None else values[worst],
            "" if worst is None else rows[worst].picture,
        )
        groups[name] = {
            group: _mean([v for v, row in zip(values, rows, strict=True) if row.group == group])
            for group in sorted({row.group for row in rows})
        }
    inside = {}
    for kind in (*INSIDE, *OUTSIDE):
        pixels = sum(row.scores.kind_px[kind] for row in rows)
        found = sum(row.scores.kind_inside_px[kind] for row in rows)
        inside[kind] = found / pixels if pixels else math.nan
    return MethodSummary(
        is_model, scores, groups, inside, {row.picture: row.scores.dice for row in rows}
    )


def _difference(
    model: str, threshold: str, by_method: Mapping[str, Sequence[Row]], draws: NDArray[np.float64]
) -> Difference:
    pairs = zip(by_method[model], by_method[threshold], strict=True)
    values = [a.scores.dice - b.scores.dice for a, b in pairs]
    low, high = interval(values, draws)
    better = sum(value > 0 for value in values)
    return Difference(model, threshold, _mean(values), low, high, better, len(values))


def _targets(model: str, summary: Summary) -> list[Target]:
    """What the issue asks of a model, each with its numbers."""
    mine = summary.methods[model]
    dice = mine.scores["dice"]
    agreed = summary.agreement_mean
    enough = dice.mean >= ENOUGH_DICE
    said = f"mean Dice {dice.mean:.4f}, wanted {ENOUGH_DICE}"
    if summary.agreement:
        enough = enough or dice.mean >= agreed - BELOW_AGREEMENT
        said += f" or the drawer's agreement {agreed:.4f} less {BELOW_AGREEMENT}"
    others = {n: m.scores["dice"] for n, m in summary.methods.items() if not m.is_model}
    targets = [Target(model, "mean_dice", enough, said)]
    if others:
        mean = max(others.items(), key=lambda item: item[1].mean)
        worst = max(others.items(), key=lambda item: item[1].worst)
        better = dice.mean > mean[1].mean and dice.worst > worst[1].worst
        said = (
            f"mean Dice {dice.mean:.4f}, best threshold {mean[1].mean:.4f} ({mean[0]}); worst slide "
            f"{dice.worst:.4f} ({dice.worst_picture}), best threshold {worst[1].worst:.4f} ({worst[0]})"
        )
        targets.append(Target(model, "better_than_thresholds", better, said))
    for kind in OUTSIDE:
        share = 1 - mine.inside[kind]
        targets.append(_kind_target(model, kind, "outside", share, ENOUGH_OUTSIDE, summary))
    for kind in INSIDE:
        share = mine.inside[kind]
        targets.append(_kind_target(model, kind, "inside", share, ENOUGH_INSIDE, summary))
    groups = mine.groups["dice"]
    for group in ("IHC", "special"):
        a, b = groups.get(group, math.nan), groups.get("H&E", math.nan)
        none = math.isnan(a) or math.isnan(b)
        said = "not drawn" if none else f"{a:.4f}, H&E {b:.4f}, at most {STAIN_GAP} less"
        met = None if none else a >= b - STAIN_GAP
        targets.append(Target(model, f"{group}_like_HE", met, said))
    return targets


def _kind_target(
    model: str, kind: str, where: str, share: float, wanted: float, summary: Summary
) -> Target:
    name = f"{kind}_{where}"
    if math.isnan(share):
        return Target(model, name, None, "not drawn")
    said = f"{share:.2%} of {summary.kind_px[kind]:,} px {where}, wanted {wanted:.0%}"
    return Target(model, name, share >= wanted, said)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
