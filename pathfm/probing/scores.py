"""The metrics that eva reports, from logits; names and edge cases are torchmetrics' (1.9).

Everything is macro-averaged over classes. Unlike scikit-learn's balanced accuracy, a class that occurs only
among the predictions counts, with 0; where all classes occur in the truth the two are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.probing.protocol import EVA_BATCH


def eva_metrics(
    logits: NDArray[np.float32], truth: NDArray[np.int64], n_classes: int, batch: int = EVA_BATCH
) -> dict[str, float]:
    """eva's metrics of one head on one part: its names without `val/` -> values 0..1, and AverageLoss.

    logits (n, classes), or (n, 1) for two classes, rows in the data set's order: AverageLoss is the mean
    over batches of `batch` rows, a smaller last one counting as much as the others.
    """
    z = np.asarray(logits, np.float64)
    if n_classes == 2:
        losses = np.logaddexp(0.0, z[:, 0]) - z[:, 0] * truth
        own = _binary(confusion(truth, (z[:, 0] > 0).astype(np.int64), 2))
        own["BinaryAUROC"] = auroc(z[:, 0], truth == 1)
    else:
        logs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        losses = -logs[np.arange(len(z)), truth]
        own = _multiclass(confusion(truth, z.argmax(axis=1), n_classes))
        own["MulticlassAUROC"] = _mean_auroc(np.exp(logs), truth, n_classes)
    means = [losses[at : at + batch].mean() for at in range(0, len(losses), batch)]
    return {"AverageLoss": float(np.mean(means)), **own}


def probabilities(logits: NDArray[np.float32], n_classes: int) -> NDArray[np.float64]:
    """(n, classes), rows summing to 1, of logits (n, classes), or (n, 1) for two classes."""
    z = np.asarray(logits, np.float64)
    if n_classes == 2:
        z = np.concatenate([np.zeros_like(z), z], axis=1)
    shares: NDArray[np.float64] = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    return shares


def confusion(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int
) -> NDArray[np.int64]:
    """Counts (n_classes, n_classes): row = true class, column = predicted class."""
    pairs = np.bincount(truth * n_classes + predicted, minlength=n_classes * n_classes)
    return pairs.reshape(n_classes, n_classes).astype(np.int64)


def auroc(score: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties counting half.

    0 where one of the two does not occur, as torchmetrics has it.
    """
    from scipy.stats import rankdata

    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return 0.0
    ranks = float(rankdata(score)[positive].sum())
    return (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def _mean_auroc(shares: NDArray[np.float64], truth: NDArray[np.int64], n_classes: int) -> float:
    """One against the rest, the mean over all classes; one that does not occur counts 0."""
    return float(np.mean([auroc(shares[:, c], truth == c) for c in range(n_classes)]))


def _multiclass(table: NDArray[np.int64]) -> dict[str, float]:
    right, there, asked = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    occurs = there + asked > 0

    def mean(part: NDArray[np.int64], whole: NDArray[np.int64]) -> float:
        return float(np.mean((part / np.maximum(whole, 1))[occurs]))

    recall = mean(right, there)
    return {
        "MulticlassAccuracy": recall,
        "MulticlassF1Score": mean(2 * right, there + asked),
        "MulticlassPrecision": mean(right, asked),
        "MulticlassRecall": recall,
    }


def _binary(table: NDArray[np.int64]) -> dict[str, float]:
    (tn, fp), (fn, tp) = table.tolist()

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    sensitivity, specificity = share(tp, tp + fn), share(tn, tn + fp)
    return {
        "BinaryAccuracy": share(tp + tn, tn + fp + fn + tp),
        "BinaryBalancedAccuracy": (sensitivity + specificity) / 2,
        "BinaryF1Score": share(2 * tp, 2 * tp + fp + fn),
        "BinaryPrecision": share(tp, tp + fp),
        "BinaryRecall": sensitivity,
    }


def selected_by(n_classes: int) -> str:
    """The metric that eva selects by and reports first."""
    return "BinaryBalancedAccuracy" if n_classes == 2 else "MulticlassAccuracy"


def statistics_of(runs: Sequence[Mapping[str, float]], prefix: str) -> dict[str, dict[str, Any]]:
    """Metrics of several runs as eva's recorder writes them: `val/NAME` -> mean, stdev and values.

    The sd has n - 1 in its denominator and is 0 for one run.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in sorted(runs[0]):
        values = [float(run[name]) for run in runs]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0
        out[f"{prefix}/{name}"] = {"mean": float(np.mean(values)), "stdev": sd, "values": values}
    return out
