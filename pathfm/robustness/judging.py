"""Probes fitted on clean features, and what they say of clean and corrupted pictures.

The probe is the one of `pathfm probe`: softmax regression on standardised features, C chosen by
balanced accuracy on a part of the training half. It sees no corrupted picture and no tested one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.measures import calibration, flip_labels
from pathfm.metrics import (
    Standardiser,
    balanced_accuracy,
    decide,
    fit_logistic,
    initial_head,
)
from pathfm.robustness.folds import Fold
from pathfm.robustness.settings import RobustnessConfig

_CHOOSING = 1 << 20  # repeats from here on draw the wrong labels of rows that choose
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Judged:
    """How a model's probes did on m tested rows. Case 0 is the pictures as they are.

    right: (m, cases), in how many splits a row was tested and told right; times: (m,), in how many it was
    tested. error, ece: (splits, cases), balanced error and calibration error of each split. noisy:
    (splits, shares), balanced error on clean test labels after training on noisy ones. c: of each split.
    """

    right: Labels
    times: Labels
    error: Floats
    ece: Floats
    noisy: Floats
    c: tuple[float, ...]


@dataclass(frozen=True)
class Head:
    """A fitted probe: features (n, d) -> logits."""

    scale: Standardiser
    weights: Floats  # (d + 1, classes), the last row the bias
    c: float

    def probabilities(self, features: NDArray[np.float32]) -> Floats:
        """Softmax of the logits, (n, classes), rows summing to 1."""
        logits = self.scale(features) @ self.weights[:-1] + self.weights[-1]
        grown = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: Floats = grown / grown.sum(axis=1, keepdims=True)
        return shares


def fit_head(
    features: NDArray[np.float32],
    labels: Labels,
    fold: Fold,
    n_classes: int,
    options: RobustnessConfig,
    repeat: int,
) -> Head:
    """The probe of a fold: features (n, d) and labels (n,) of all pictures; looks at no tested one.

    C is the one whose head, fitted on `fold.fit`, names `fold.choose` best (a tie goes to the stronger
    penalty); then the head is solved again on `fold.final`.
    """
    start = initial_head(features.shape[1], n_classes, options.seed, repeat)
    scale = Standardiser.of(features[fold.fit])
    x, v = scale(features[fold.fit]), scale(features[fold.choose])
    best, path = (-1.0, options.c_values[0]), start
    for c in sorted(options.c_values):
        path = fit_logistic(x, labels[fold.fit], c, path)
        score = balanced_accuracy(labels[fold.choose], decide(v, path), n_classes)
        if score > best[0] + 1e-9:
            best = (score, c)
    scale = Standardiser.of(features[fold.final])
    x = scale(features[fold.final])
    return Head(scale, fit_logistic(x, labels[fold.final], best[1], start), best[1])


def judge(
    clean: NDArray[np.float32],
    corrupted: Sequence[NDArray[np.float32]],
    tested: NDArray[np.int64],
    labels: Labels,
    n_classes: int,
    folds: Sequence[Fold],
    options: RobustnessConfig,
) -> Judged:
    """One model's probes on every fold and case.

    clean: features (n, d) of all pictures; corrupted: (m, d) of the rows `tested`, one array a case;
    labels: of all pictures.
    """
    n_cases = 1 + len(corrupted)
    right, times = np.zeros((len(tested), n_cases), np.int64), np.zeros(len(tested), np.int64)
    error, ece = np.zeros((2, len(folds), n_cases))
    noisy, chosen = np.zeros((len(folds), len(options.noise_shares))), []
    for repeat, fold in enumerate(folds):
        truth, at = labels[fold.test], np.searchsorted(tested, fold.test)
        head = fit_head(clean, labels, fold, n_classes, options, repeat)
        chosen.append(head.c)
        times[at] += 1
        for case in range(n_cases):
            features = clean[fold.test] if case == 0 else corrupted[case - 1][at]
            shares = head.probabilities(features)
            told = shares.argmax(axis=1)
            right[at, case] += told == truth
            error[repeat, case] = 1 - balanced_accuracy(truth, told, n_classes)
            ece[repeat, case] = calibration(shares, truth).ece
        for i, share in enumerate(options.noise_shares):
            wrong = flipped(labels, fold, share, n_classes, options.seed, repeat)
            head = fit_head(clean, wrong, fold, n_classes, options, repeat)
            told = head.probabilities(clean[fold.test]).argmax(axis=1)
            noisy[repeat, i] = 1 - balanced_accuracy(truth, told, n_classes)
    return Judged(right, times, error, ece, noisy, tuple(chosen))


def flipped(
    labels: Labels, fold: Fold, share: float, n_classes: int, seed: int, repeat: int
) -> Labels:
    """All labels (n,), a share of those fitted on made wrong, and the same share of those that choose.

    Reported ones stay right: where validation reports, C is chosen on right labels.
    """
    out = labels.copy()
    for part, rows in enumerate((fold.fit, np.setdiff1d(fold.choose, fold.test))):
        if len(rows):
            out[rows] = flip_labels(labels[rows], share, n_classes, seed, part * _CHOOSING + repeat)
    return out
