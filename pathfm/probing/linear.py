"""Frozen features -> a linear probe and kNN on given splits, and two backbones seed by seed.

Linear probe: softmax regression on standardised features (mean and sd of the training part), the
objective of scikit-learn's LogisticRegression, solved to convergence by L-BFGS in float64; C is
chosen by balanced accuracy on a validation part of the training half, then the head is solved again
on the whole training half. The problem is convex: the drawn initial head changes the path, not the
result. kNN: cosine, equal votes, no choice to make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import Split, stratified_split
from pathfm.embeddings import Embeddings
from pathfm.metrics import (
    Standardiser,
    balanced_accuracy,
    confusion_matrix,
    decide,
    fit_logistic,
    initial_head,
    knn_predict,
    rankme,
    recall_per_class,
)

PROBES = ("logistic", "knn")
_VALIDATION_REPEAT = 1 << 20  # attempts from here on are splits of a training half


class ProbeOptions(Protocol):
    """What the probes need to know; `ProbeConfig` says what each means."""

    @property
    def seed(self) -> int:
        """Key of all splits and heads."""

    @property
    def validation_share(self) -> float:
        """Share of the training half that chooses C."""

    @property
    def c_values(self) -> Sequence[float]:
        """Inverse L2 strengths tried."""

    @property
    def k(self) -> int:
        """Neighbours of the kNN probe."""


@dataclass(frozen=True)
class Scores:
    """One probe of one backbone: balanced accuracy (0..1) of every seed, and what is behind it."""

    values: list[float]
    mean: float
    sd: float  # over seeds, n - 1 in the denominator; 0 for one seed
    recall: list[float]  # mean over seeds, one a class
    confusion: list[list[int]]  # summed over seeds; row = true class
    c: list[float]  # chosen inverse L2 strength of each seed; [] for kNN


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


@dataclass(frozen=True)
class Paired:
    """Other minus baseline, seed by seed, in balanced accuracy."""

    baseline: str
    other: str
    probe: str
    differences: list[float]
    mean: float
    sd: float
    no_worse: bool  # mean of other >= mean of baseline - sd of baseline


def probe_backbone(
    data: Embeddings,
    splits: Sequence[Split],
    options: ProbeOptions,
    advance: Callable[[int], object] | None = None,
) -> BackboneResult:
    """Both probes on every split."""
    n_classes = len(data.classes)
    predictions: dict[str, list[NDArray[np.int64]]] = {probe: [] for probe in PROBES}
    chosen: list[float] = []
    for repeat, split in enumerate(splits):
        c, predicted = logistic_predict(data, split, options, repeat)
        chosen.append(c)
        predictions["logistic"].append(predicted)
        train, test = data.features[split.train], data.features[split.test]
        predictions["knn"].append(
            knn_predict(train, data.labels[split.train], test, options.k, n_classes)
        )
        if advance is not None:
            advance(1)
    truths = [data.labels[split.test] for split in splits]
    return BackboneResult(
        name=data.info.name,
        backbone=data.info.backbone,
        backbone_digest=data.info.backbone_digest,
        weights_note=data.info.weights_note,
        dim=data.features.shape[1],
        precision=data.info.precision,
        rankme=rankme(data.features),
        probes={
            "logistic": _scores(truths, predictions["logistic"], n_classes, chosen),
            "knn": _scores(truths, predictions["knn"], n_classes, []),
        },
    )


def logistic_predict(
    data: Embeddings, split: Split, options: ProbeOptions, repeat: int
) -> tuple[float, NDArray[np.int64]]:
    """The C that validation chose and the test half's predicted classes, (n_test,)."""
    labels, n_classes = data.labels, len(data.classes)
    groups = [data.groups[i] for i in split.train] if data.groups else ()
    inner = stratified_split(
        labels[split.train],
        options.validation_share,
        options.seed,
        _VALIDATION_REPEAT + repeat,
        groups,
    )
    fit_rows, validation_rows = split.train[inner.train], split.train[inner.test]
    head = initial_head(data.features.shape[1], n_classes, options.seed, repeat)
    scale = Standardiser.of(data.features[fit_rows])
    x, v = scale(data.features[fit_rows]), scale(data.features[validation_rows])
    best = (-1.0, options.c_values[0])
    path_head = head
    for c in sorted(options.c_values):  # strong to weak: each solution starts the next
        path_head = fit_logistic(x, labels[fit_rows], c, path_head)
        predicted = decide(v, path_head)
        score = balanced_accuracy(labels[validation_rows], predicted, n_classes)
        if score > best[0] + 1e-9:  # a tie goes to the stronger penalty
            best = (score, c)
    scale = Standardiser.of(data.features[split.train])
    head = fit_logistic(scale(data.features[split.train]), labels[split.train], best[1], head)
    return best[1], decide(scale(data.features[split.test]), head)


def _scores(
    truths: Sequence[NDArray[np.int64]],
    predictions: Sequence[NDArray[np.int64]],
    n_classes: int,
    c: list[float],
) -> Scores:
    pairs = list(zip(truths, predictions, strict=True))
    values = [balanced_accuracy(truth, predicted, n_classes) for truth, predicted in pairs]
    tables = [confusion_matrix(truth, predicted, n_classes) for truth, predicted in pairs]
    recall = np.nanmean([recall_per_class(table) for table in tables], axis=0)
    return Scores(
        values=values,
        mean=float(np.mean(values)),
        sd=_sd(values),
        recall=recall.tolist(),
        confusion=np.sum(tables, axis=0).tolist(),
        c=c,
    )


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def compare_paired(baseline: BackboneResult, other: BackboneResult, probe: str) -> Paired:
    """Other minus baseline on the same splits."""
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
