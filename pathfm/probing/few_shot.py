"""Few samples of each class: how much do features tell before there is anything to train on?

`k` training samples a class are drawn, a classifier is fitted on them alone, and it is scored on the
reported rows; again with new draws. Draws are nested: a resample's samples for k are among those for 2k,
and all features of one data set see the same draws. Nothing is chosen, so validation plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.metrics import balanced_accuracy, decide, fit_logistic, initial_head
from pathfm.probing.orders import draw_shots
from pathfm.probing.parts import Parts, check_inputs
from pathfm.runtime import PathfmError

SHOTS = (1, 2, 4, 8, 16, 32, 64)
METHODS = ("simpleshot", "logistic")


@dataclass(frozen=True)
class FewShotScores:
    """Balanced accuracy (0..1) of one method; one row a number of shots, one column a resample."""

    shots: list[int]
    values: list[list[float]]
    mean: list[float]
    sd: list[float]  # over resamples, n - 1 in the denominator


def few_shot(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    parts: Parts,
    n_classes: int,
    shots: Sequence[int] = SHOTS,
    resamples: int = 20,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> dict[str, FewShotScores]:
    """SimpleShot's and logistic regression's scores for every number of shots a class.

    Raises `PathfmError` where a class has fewer training samples than the largest number of shots.
    """
    check_inputs(features, labels, parts, n_classes)
    check_shots(labels, parts, shots)
    if resamples < 2:
        raise PathfmError(f"{resamples} resamples: at least 2, or there is no spread to tell")
    truth, x = labels[parts.reported], features[parts.reported].astype(np.float64)
    found: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for k in shots:
        scores: dict[str, list[float]] = {method: [] for method in METHODS}
        for resample in range(resamples):
            rows = draw_shots(parts.train, labels, k, seed, resample)
            predicted = predict_from(features[rows], labels[rows], x, n_classes)
            for method in METHODS:
                scores[method].append(balanced_accuracy(truth, predicted[method], n_classes))
            if advance is not None:
                advance(1)
        for method in METHODS:
            found[method].append(scores[method])
    return {
        method: FewShotScores(
            shots=list(shots),
            values=values,
            mean=np.mean(values, axis=1).tolist(),
            sd=np.std(values, axis=1, ddof=1).tolist(),
        )
        for method, values in found.items()
    }


def check_shots(
    labels: NDArray[np.int64], parts: Parts, shots: Sequence[int], names: Sequence[str] = ()
) -> None:
    """`PathfmError` unless every class has as many training samples as the largest of `shots`.

    names: of the classes, for the error; without them it tells their numbers.
    """
    if not shots or min(shots) < 1 or len(set(shots)) < len(shots):
        raise PathfmError(f"shots {list(shots)}: some, each at least 1 and there once")
    smallest, most = smallest_class(labels, parts)
    if most < max(shots):
        usable = [k for k in shots if k <= most] or [most]
        raise PathfmError(
            f"class {names[smallest] if names else smallest} has {most:,} training samples, fewer than the "
            f"{max(shots)} shots asked for: use --shots {' '.join(map(str, usable))}"
        )


def smallest_class(labels: NDArray[np.int64], parts: Parts) -> tuple[int, int]:
    """The class with the fewest training samples, and how many it has."""
    classes, counts = np.unique(labels[parts.train], return_counts=True)
    return int(classes[counts.argmin()]), int(counts.min())


def predict_from(
    support: NDArray[np.floating],
    labels: NDArray[np.int64],
    queries: NDArray[np.floating],
    n_classes: int,
) -> dict[str, NDArray[np.int64]]:
    """The classes (n,) that both methods give to queries (n, d) from a support set (m, d).

    Features are centred by the support's mean and scaled to length 1 (CL2N). "simpleshot": the nearest
    class mean (Wang et al. 2019, "SimpleShot", eq. 2; there the mean is that of the base classes, which
    frozen features lack). "logistic": regression on the same features with C = d * classes / 100, which is
    the lambda = 100 / (M C) of UNI (Chen et al. 2024).
    """
    centre = support.astype(np.float64).mean(axis=0)
    s, q = (_unit(part.astype(np.float64) - centre) for part in (support, queries))
    means = np.stack([s[labels == label].mean(axis=0) for label in range(n_classes)])
    # |q - m|^2 without |q|^2, which is the same for all classes
    distance = (means**2).sum(axis=1) - 2 * q @ means.T
    c = s.shape[1] * n_classes / 100
    head = fit_logistic(s, labels, c, initial_head(s.shape[1], n_classes, 0, 0))
    return {"simpleshot": distance.argmin(axis=1).astype(np.int64), "logistic": decide(q, head)}


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: NDArray[np.float64] = x / np.where(norms == 0, 1.0, norms)
    return unit
