"""Everything measured on one backbone's features, and two backbones side by side.

Data with its own splits is probed on them, once: their test reports, or their validation where there is
no test, and then that part both chose and reports. Data without is split anew for every repeat.
eva's heads and few-shot see one split (the first), and vary head, batches and samples instead. A data
set that is trained on few samples a class (`Facts.shots`) has new ones of them in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import DATASETS, Split, stratified_split
from pathfm.embeddings import Embeddings
from pathfm.metrics import initial_head, knn_shares, rankme_of_some
from pathfm.probing.few_shot import FewShotScores, few_shot
from pathfm.probing.linear import fit_probe
from pathfm.probing.orders import Balanced
from pathfm.probing.parts import Parts, check_inputs
from pathfm.probing.scores import eva_metrics, probabilities
from pathfm.probing.scoring import (
    Answers,
    MppScores,
    Paired,
    Scores,
    by_mpp,
    paired_scores,
    scores_of,
    with_interval,
)
from pathfm.probing.settings import ProbeConfig
from pathfm.runtime import PathfmError
from pathfm.uncertainty import Predictions

if TYPE_CHECKING:
    from pathfm.probing.heads import TrainedHeads

PROBES = ("logistic", "knn")
"""Always there; "eva" is the third where it was asked for."""
_VALIDATION_REPEAT = 1 << 20  # attempts from here on are splits of a training half


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
    mpp: float = 0.0  # µm/px of the input; 0 where it is not known, or not one
    pooling: str = ""
    transform: str = ""  # from a picture to the model's input, as embed tells it
    by_mpp: list[MppScores] = field(default_factory=list)  # where the rows differ in µm/px


@dataclass(frozen=True)
class Measured:
    """A result, what each probe predicted, and eva's heads where they were asked for."""

    result: BackboneResult
    predictions: dict[str, Predictions]
    heads: TrainedHeads | None
    eva: list[dict[str, float]]  # eva's metrics on the reported part, one a run
    eva_val: list[dict[str, float]]  # and on validation


def shots_of(data: Embeddings) -> int:
    """Samples a class that this data set is trained on, by its own protocol; 0: all."""
    entry = DATASETS.get(data.info.data)
    return entry.facts.shots if entry is not None and any(data.splits) else 0


def with_own_protocol(options: ProbeConfig, data: Embeddings) -> ProbeConfig:
    """The options as the data set's own protocol has them.

    Trained on few shots, eva's heads belong to it, and kNN asks at most as many neighbours as a class has
    samples: twenty of ten and ten would always be a tie.
    """
    shots = shots_of(data)
    if not shots:
        return options
    also = options.also if "eva" in options.also else ("eva", *options.also)
    return options.model_copy(update={"also": also, "k": min(options.k, shots)})


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


def repeats_of(
    data: Embeddings, splits: Sequence[Split] | Parts, options: ProbeConfig
) -> list[Parts]:
    """What each repeat of the plain probes is fitted on, chosen by and judged on."""
    if not isinstance(splits, Parts):
        return [parts_of(data, split, options, repeat) for repeat, split in enumerate(splits)]
    shots = shots_of(data)
    if not shots:
        return [splits]
    runs = range(options.head_protocol(shots).n_runs)
    drawn = Balanced(splits.train, data.labels, shots, options.seed)
    return [Parts(drawn.rows(run, 0), splits.val, splits.test) for run in runs]


def voters_of(parts: Parts, own: bool) -> NDArray[np.int64]:
    """The rows that kNN asks: training alone where the split is the data set's own, else val's as well."""
    return parts.train if own else np.sort(np.concatenate([parts.train, parts.val]))


def check_k(data: Embeddings, splits: Sequence[Split] | Parts, options: ProbeConfig) -> list[str]:
    """A sentence where kNN's default `k` is more than the rows it may ask, so that it asks all of them.

    `PathfmError` where the user gave that `k`: the scores would be chance.
    """
    own = isinstance(splits, Parts) and not splits.carved
    fewest = min(len(voters_of(parts, own)) for parts in repeats_of(data, splits, options))
    if options.k <= fewest:
        return []
    told = (
        f"k = {options.k:,} neighbours, but only {fewest:,} training pictures to choose them from"
    )
    if "k" in options.model_fields_set:
        raise PathfmError(f"kNN of {told}: use --k {min(20, fewest)}, at most {fewest:,}")
    return [f"kNN asks {told}: it says the largest class. Use --k, less than {fewest:,}."]


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
    own = isinstance(splits, Parts) and not splits.carved
    n_classes = len(data.classes)
    repeats = repeats_of(data, splits, options)
    first = splits if isinstance(splits, Parts) else repeats[0]
    for parts in (first, *repeats):
        check_inputs(data.features, data.labels, parts, n_classes)
    answers = _plain(data, repeats, own, options, advance)
    heads, eva, eva_val = None, [], []
    if "eva" in options.also:
        heads = _train(data, first, options)
        answers["eva"] = _of_heads(heads, data, first)
        eva = _eva_scores(heads, data, first.reported)
        eva_val = _eva_scores(heads, data, first.val)
    shots = {}
    if "few-shot" in options.also:
        each = (options.shots, options.resamples, options.seed)
        shots = few_shot(data.features, data.labels, first, n_classes, *each)
    result = BackboneResult(
        name=data.info.name,
        backbone=data.info.backbone,
        backbone_digest=data.info.backbone_digest,
        weights_note=data.info.weights_note,
        dim=data.features.shape[1],
        precision=data.info.precision,
        rankme=rankme_of_some(data.features),
        probes={probe: scores_of(each, data) for probe, each in answers.items()},
        few_shot=shots,
        mpp=data.info.mpp,
        pooling=data.info.pooling,
        transform=data.info.transform,
        by_mpp=by_mpp(answers, data),
    )
    predictions = {probe: each.predictions(data) for probe, each in answers.items()}
    return Measured(result, predictions, heads, eva, eva_val)


def _plain(
    data: Embeddings,
    repeats: Sequence[Parts],
    own: bool,
    options: ProbeConfig,
    advance: Callable[[int], object] | None,
) -> dict[str, Answers]:
    """What logistic regression and kNN say in every repeat.

    Where the split, or its val, is ours, C is chosen on a part of the training half and the head fitted on
    all of it; on a data set's own splits training alone is fitted on, as eva does.
    """
    n_classes, dim = len(data.classes), data.features.shape[1]
    shares: dict[str, list[NDArray[np.float64]]] = {probe: [] for probe in PROBES}
    classes: dict[str, list[NDArray[np.int64]]] = {probe: [] for probe in PROBES}
    chosen = []
    for repeat, parts in enumerate(repeats):
        train = voters_of(parts, own)
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
        x = data.features[parts.reported]
        classes["logistic"].append(probe.predict(x))
        shares["logistic"].append(probe.probabilities(x))
        votes = knn_shares(data.features[train], data.labels[train], x, options.k, n_classes)
        classes["knn"].append(votes.argmax(axis=1).astype(np.int64))
        shares["knn"].append(votes)
        if advance is not None:
            advance(1)
    rows, c = [parts.reported for parts in repeats], {"logistic": tuple(chosen)}
    return {p: Answers(rows, classes[p], shares[p], c.get(p, ())) for p in PROBES}


def _train(data: Embeddings, parts: Parts, options: ProbeConfig) -> TrainedHeads:
    """eva's heads, on all training rows or on a few of each class, drawn anew for every run."""
    from pathfm.probing.heads import train_heads  # brings torch

    shots = shots_of(data)
    return train_heads(
        data.features,
        data.labels,
        parts,
        len(data.classes),
        options.head_protocol(shots),
        orders=Balanced(parts.train, data.labels, shots, options.seed) if shots else None,
        device=options.eva_device(),
    )


def _of_heads(heads: TrainedHeads, data: Embeddings, parts: Parts) -> Answers:
    x = data.features[parts.reported]
    shares = [probabilities(logits, len(data.classes)) for logits in heads.logits(x)]
    classes = list(heads.predict(x))
    rows = [parts.reported] * len(classes)
    return Answers(rows, classes, shares, rate=heads.learning_rates[heads.rate])


def _eva_scores(
    heads: TrainedHeads, data: Embeddings, rows: NDArray[np.int64]
) -> list[dict[str, float]]:
    """eva's metrics of every run at the chosen learning rate."""
    truth = data.labels[rows]
    return [
        eva_metrics(logits, truth, len(data.classes))
        for logits in heads.logits(data.features[rows])
    ]


def compare_paired(baseline: BackboneResult, other: BackboneResult, probe: str) -> Paired:
    """Other minus baseline on the same repeats."""
    a, b = ((each.name, each.probes[probe]) for each in (baseline, other))
    return paired_scores(a, b, probe)


def compare_measured(baseline: Measured, other: Measured, probe: str) -> Paired:
    """`compare_paired` with the interval of the difference, and how surprising it is without one."""
    plain = compare_paired(baseline.result, other.result, probe)
    return with_interval(plain, baseline.predictions[probe], other.predictions[probe])
