"""Everything measured on one backbone's features, and two backbones side by side.

Data with its own splits is probed on them, once: their test reports, or their validation where there is
no test, and then that part both chose and reports. Data without is split anew for every repeat.
eva's heads and few-shot see one split (the first), and vary head, batches and samples instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import Split, stratified_split
from pathfm.embeddings import Embeddings
from pathfm.metrics import confusion_matrix, initial_head, knn_predict, rankme, recall_per_class
from pathfm.probing.few_shot import FewShotScores, few_shot
from pathfm.probing.linear import fit_probe
from pathfm.probing.parts import Parts, check_inputs
from pathfm.probing.scores import eva_metrics
from pathfm.probing.settings import ProbeConfig
from pathfm.runtime import PathfmError, one_line
from pathfm.uncertainty import Predictions
from pathfm.uncertainty import compare as compare_predictions
from pathfm.uncertainty import score as score_predictions

if TYPE_CHECKING:
    from pathfm.probing.heads import TrainedHeads

PROBES = ("logistic", "knn")
"""Always there; "eva" is the third where it was asked for."""
_VALIDATION_REPEAT = 1 << 20  # attempts from here on are splits of a training half


@dataclass(frozen=True)
class Scores:
    """One probe of one backbone: balanced accuracy (0..1) of every repeat, and what is behind it.

    A repeat is a split of the data, or with eva's heads, and on a data set's own splits, a run.
    """

    values: list[float]
    mean: float
    sd: float  # over repeats, n - 1 in the denominator; 0 for one
    recall: list[float]  # mean over repeats, one a class
    confusion: list[list[int]]  # summed over repeats; row = true class
    c: list[float]  # chosen inverse L2 strength of each repeat; [] where there is none
    interval: list[float] = field(default_factory=list)  # of the mean: low, high, over groups
    interval_of: str = ""  # what was resampled: "groups" or "pictures"
    interval_note: str = ""  # why there is none, or why not to trust it
    learning_rate: float | None = None  # eva: what validation chose


@dataclass(frozen=True)
class BackboneResult:
    """Everything measured on one backbone's features."""

    name: str
    backbone: str
    backbone_digest: str
    weights_note: str
    dim: int
    precision: str
    rankme: float
    probes: dict[str, Scores]
    few_shot: dict[str, FewShotScores] = field(default_factory=dict)


@dataclass(frozen=True)
class Paired:
    """Other minus baseline, repeat by repeat, in balanced accuracy."""

    baseline: str
    other: str
    probe: str
    differences: list[float]
    mean: float
    sd: float
    no_worse: bool  # mean of other >= mean of baseline - sd of baseline
    interval: list[float] = field(default_factory=list)  # of the mean difference, paired
    p: float | None = None  # of no difference: predictions swapped group by group


@dataclass(frozen=True)
class Measured:
    """A result, what each probe predicted, and eva's heads where they were asked for."""

    result: BackboneResult
    predictions: dict[str, Predictions]
    heads: TrainedHeads | None
    eva: list[dict[str, float]]  # eva's metrics on the reported part, one a run
    eva_val: list[dict[str, float]]  # and on validation


def parts_of(data: Embeddings, split: Split, options: ProbeConfig, repeat: int) -> Parts:
    """Train, validation and test of a repeat: `split`'s training half is parted once more."""
    groups = [data.groups[i] for i in split.train] if data.groups else ()
    inner = stratified_split(
        data.labels[split.train],
        options.validation_share,
        options.seed,
        _VALIDATION_REPEAT + repeat,
        groups,
    )
    return Parts(split.train[inner.train], split.train[inner.test], split.test)


def probe_backbone(
    data: Embeddings,
    splits: Sequence[Split] | Parts,
    options: ProbeConfig,
    advance: Callable[[int], object] | None = None,
) -> BackboneResult:
    """All probes on every split, or on the data set's own."""
    return measure(data, splits, options, advance).result


def measure(
    data: Embeddings,
    splits: Sequence[Split] | Parts,
    options: ProbeConfig,
    advance: Callable[[int], object] | None = None,
) -> Measured:
    """`probe_backbone` with the predictions and heads behind its figures."""
    own = isinstance(splits, Parts)
    all_parts = (
        [splits]
        if isinstance(splits, Parts)
        else [parts_of(data, split, options, repeat) for repeat, split in enumerate(splits)]
    )
    n_classes = len(data.classes)
    for parts in all_parts:
        check_inputs(data.features, data.labels, parts, n_classes)
    predictions, chosen = _plain(data, all_parts, own, options, advance)
    heads, eva, eva_val = None, [], []
    if "eva" in options.also:
        from pathfm.probing.heads import train_heads  # brings torch

        parts, protocol = all_parts[0], options.head_protocol()
        heads = train_heads(
            data.features, data.labels, parts, n_classes, protocol, device=options.eva_device()
        )
        predictions["eva"] = _judged(data, parts, heads.predict(data.features[parts.reported]))
        eva = _eva_scores(heads, data, parts.reported)
        eva_val = _eva_scores(heads, data, parts.val)
    shots = {}
    if "few-shot" in options.also:
        shots = few_shot(
            data.features,
            data.labels,
            all_parts[0],
            n_classes,
            options.shots,
            options.resamples,
            options.seed,
        )
    rate = heads.learning_rates[heads.rate] if heads else None
    result = BackboneResult(
        name=data.info.name,
        backbone=data.info.backbone,
        backbone_digest=data.info.backbone_digest,
        weights_note=data.info.weights_note,
        dim=data.features.shape[1],
        precision=data.info.precision,
        rankme=rankme(data.features),
        probes={
            probe: _scores(
                made, chosen if probe == "logistic" else [], rate if probe == "eva" else None
            )
            for probe, made in predictions.items()
        },
        few_shot=shots,
    )
    return Measured(result, predictions, heads, eva, eva_val)


def _plain(
    data: Embeddings,
    all_parts: Sequence[Parts],
    own: bool,
    options: ProbeConfig,
    advance: Callable[[int], object] | None,
) -> tuple[dict[str, Predictions], list[float]]:
    """What logistic regression and kNN predict in every repeat, and the C that was chosen.

    Where the split is ours, C is chosen on a part of the training half and the head fitted on all of it;
    on a data set's own splits training alone is fitted on, as eva does.
    """
    n_classes, dim = len(data.classes), data.features.shape[1]
    table = {probe: np.full((len(all_parts), len(data.labels)), -1, np.int64) for probe in PROBES}
    chosen = []
    for repeat, parts in enumerate(all_parts):
        train = parts.train if own else np.sort(np.concatenate([parts.train, parts.val]))
        probe = fit_probe(
            data.features,
            data.labels,
            parts.train,
            parts.val,
            options.c_values,
            initial_head(dim, n_classes, options.seed, repeat),
            refit=None if own else train,
        )
        chosen.append(probe.c)
        rows = parts.reported
        table["logistic"][repeat, rows] = probe.predict(data.features[rows])
        table["knn"][repeat, rows] = knn_predict(
            data.features[train], data.labels[train], data.features[rows], options.k, n_classes
        )
        if advance is not None:
            advance(1)
    return {probe: _predictions(data, predicted) for probe, predicted in table.items()}, chosen


def _judged(data: Embeddings, parts: Parts, predicted: NDArray[np.int64]) -> Predictions:
    """Predictions (runs, reported rows) as (runs, n)."""
    table = np.full((len(predicted), len(data.labels)), -1, np.int64)
    table[:, parts.reported] = predicted
    return _predictions(data, table)


def _predictions(data: Embeddings, table: NDArray[np.int64]) -> Predictions:
    return Predictions(data.labels, table, len(data.classes), data.groups, data.info.name)


def _eva_scores(
    heads: TrainedHeads, data: Embeddings, rows: NDArray[np.int64]
) -> list[dict[str, float]]:
    """eva's metrics of every run at the chosen learning rate."""
    truth = data.labels[rows]
    return [
        eva_metrics(logits, truth, len(data.classes))
        for logits in heads.logits(data.features[rows])
    ]


def _scores(made: Predictions, c: list[float], rate: float | None) -> Scores:
    tables = [
        confusion_matrix(made.truth[judged], predicted[judged], made.n_classes)
        for predicted, judged in zip(made.predicted, made.predicted >= 0, strict=True)
    ]
    recall = [recall_per_class(table) for table in tables]
    values = [float(np.nanmean(each)) for each in recall]
    interval, note = _interval(made)
    return Scores(
        values=values,
        mean=float(np.mean(values)),
        sd=_sd(values),
        recall=np.nanmean(recall, axis=0).tolist(),
        confusion=np.sum(tables, axis=0).tolist(),
        c=c,
        interval=interval,
        interval_of="groups" if made.groups else "pictures",
        interval_note=note,
        learning_rate=rate,
    )


def _interval(made: Predictions) -> tuple[list[float], str]:
    """Low and high, and what a reader must know; no interval where the groups are too few for one."""
    try:
        found = score_predictions(made).interval
    except PathfmError as error:
        return [], f"no interval: {one_line(error).removeprefix('no interval: ')}"
    return [found.low, found.high], " ".join(found.caveats)


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def compare_paired(baseline: BackboneResult, other: BackboneResult, probe: str) -> Paired:
    """Other minus baseline on the same repeats."""
    a, b = baseline.probes[probe], other.probes[probe]
    differences = [y - x for x, y in zip(a.values, b.values, strict=True)]
    return Paired(
        baseline=baseline.name,
        other=other.name,
        probe=probe,
        differences=differences,
        mean=float(np.mean(differences)),
        sd=_sd(differences),
        no_worse=b.mean >= a.mean - a.sd,
    )


def compare_measured(baseline: Measured, other: Measured, probe: str) -> Paired:
    """`compare_paired` with the interval of the difference, and how surprising it is without one."""
    plain = compare_paired(baseline.result, other.result, probe)
    try:
        found = compare_predictions(baseline.predictions[probe], other.predictions[probe])
    except PathfmError:  # too few groups: the scores' own note says so
        return plain
    return replace(plain, interval=[found.interval.low, found.interval.high], p=found.p_swap)
