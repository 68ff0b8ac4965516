"""Logistic regression by L-BFGS, C chosen on validation: a probe without learning rate or luck.

Softmax regression on standardised features (mean and sd of the rows fitted on), the objective of
scikit-learn's LogisticRegression, solved to convergence in float64. The problem is convex: the first
head changes the path, not the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.metrics import Standardiser, balanced_accuracy, decide, fit_logistic
from pathfm.probing.parts import Rows


@dataclass(frozen=True)
class LogisticProbe:
    """A fitted head and the standardisation before it."""

    scale: Standardiser
    head: NDArray[np.float64]  # (d + 1, classes); the last row is the bias
    c: float  # the inverse L2 strength that validation chose

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """(n,) classes of (n, d) features."""
        return decide(self.scale(features), self.head)

    def probabilities(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, classes), rows summing to 1."""
        logits = self.scale(features) @ self.head[:-1] + self.head[-1]
        shares: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return shares


def fit_probe(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    fit: Rows,
    val: Rows,
    c_values: Sequence[float],
    start: NDArray[np.float64],
    refit: Rows | None = None,
) -> LogisticProbe:
    """The probe fitted on the rows `fit` with the C that does best on the rows `val`.

    features (n, d), labels (n,); start (d + 1, classes) as of `metrics.initial_head`. Best by balanced
    accuracy; a tie goes to the stronger penalty. `refit`: rows that the final head is fitted on, such as
    both parts together; without them it is the one that was chosen.
    """
    n_classes = start.shape[1]
    scale = Standardiser.of(features[fit])
    x, v = scale(features[fit]), scale(features[val])
    best, path = (-1.0, LogisticProbe(scale, start, c_values[0])), start
    for c in sorted(c_values):  # strong to weak: each solution starts the next
        path = fit_logistic(x, labels[fit], c, path)
        score = balanced_accuracy(labels[val], decide(v, path), n_classes)
        if score > best[0] + 1e-9:
            best = (score, LogisticProbe(scale, path, c))
    if refit is None:
        return best[1]
    scale = Standardiser.of(features[refit])
    head = fit_logistic(scale(features[refit]), labels[refit], best[1].c, start)
    return LogisticProbe(scale, head, best[1].c)
