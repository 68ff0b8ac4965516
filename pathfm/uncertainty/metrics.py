"""Metrics of a confusion table, for any number of tables at once.

A table is float64 (..., classes, classes): counts (or sums of weights), row = true class, column =
predicted class. A metric maps it to (...). NaN where a table says nothing, such as an empty one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Metric = Callable[[Table], NDArray[np.float64]]


def accuracy(table: Table) -> NDArray[np.float64]:
    """Share of samples that are right."""
    return _ratio(_right(table).sum(-1), table.sum((-2, -1)))


def balanced_accuracy(table: Table) -> NDArray[np.float64]:
    """Mean recall over the classes that occur as true ones: scikit-learn's `balanced_accuracy_score`."""
    there = table.sum(-1) > 0
    recall = np.where(there, _ratio(_right(table), table.sum(-1)), 0.0)
    return _ratio(recall.sum(-1), there.sum(-1).astype(np.float64))


def macro_accuracy(table: Table) -> NDArray[np.float64]:
    """Mean recall as kaiko-eva reports it (torchmetrics' macro MulticlassAccuracy).

    A class that is predicted and never true counts as recall 0; one that is neither does not count.
    Equal to `balanced_accuracy` where every class is true at least once.
    """
    right, true, told = _right(table), table.sum(-1), table.sum(-2)
    recall = np.where(true > 0, _ratio(right, true), 0.0)
    return _ratio(recall.sum(-1), ((true > 0) | (told > 0)).sum(-1).astype(np.float64))


def macro_f1(table: Table) -> NDArray[np.float64]:
    """Mean F1 over the classes that are true or predicted: scikit-learn's macro `f1_score`."""
    both = table.sum(-1) + table.sum(-2)
    f1 = np.where(both > 0, _ratio(2 * _right(table), both), 0.0)
    return _ratio(f1.sum(-1), (both > 0).sum(-1).astype(np.float64))


def cohen_kappa(table: Table) -> NDArray[np.float64]:
    """Agreement beyond chance (Cohen 1960); NaN where chance alone would agree always."""
    return _kappa(table, 1.0 - np.eye(table.shape[-1]))


def quadratic_kappa(table: Table) -> NDArray[np.float64]:
    """Kappa with squared distances of ordered classes as weights (Cohen 1968): PANDA's metric."""
    grade = np.arange(table.shape[-1], dtype=np.float64)
    return _kappa(table, (grade[:, None] - grade) ** 2)


METRICS: dict[str, Metric] = {
    "balanced_accuracy": balanced_accuracy,
    "macro_accuracy": macro_accuracy,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "cohen_kappa": cohen_kappa,
    "quadratic_kappa": quadratic_kappa,
}
"""By the names that options and tables use."""


def _kappa(table: Table, weight: Table) -> NDArray[np.float64]:
    expected = table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :]
    chance = _ratio((expected * weight).sum((-2, -1)), table.sum((-2, -1)))
    return 1.0 - _ratio((table * weight).sum((-2, -1)), chance)


def _right(table: Table) -> NDArray[np.float64]:
    right: NDArray[np.float64] = np.diagonal(table, axis1=-2, axis2=-1)
    return right


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole, NaN where the whole is 0."""
    out: NDArray[np.float64] = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    return np.divide(part, whole, out=out, where=whole != 0)
