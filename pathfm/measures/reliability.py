"""Expected calibration error: how far confidence is from the share of right answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.runtime import PathfmError


@dataclass(frozen=True)
class Calibration:
    """ECE (0..1), and the reliability diagram behind it, one value a bin (NaN in an empty one).

    overconfidence: mean confidence minus accuracy, -1..1, with its sign.
    """

    ece: float
    overconfidence: float
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def calibration(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> Calibration:
    """ECE of class probabilities (n, classes) on labels (n,), in `n_bins` bins of equal width.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), eq. 5: sum over bins m of
    |B_m| / n * |acc(B_m) - conf(B_m)|, confidence being the largest probability and bin m holding
    ((m - 1) / M, m / M]. A tie between classes is decided for the first. Raises `PathfmError` for
    rows that are no probabilities, labels outside the classes, or no rows.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64)
    _check(p, y, n_bins)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    # the product of a bound and M is rounded: compare with the bounds themselves
    bounds = np.arange(1, n_bins) / n_bins
    bin_of = np.searchsorted(bounds, confidence, side="left")
    counts = np.bincount(bin_of, minlength=n_bins).astype(np.int64)
    sums = np.bincount(bin_of, confidence, n_bins), np.bincount(bin_of, right, n_bins)
    with np.errstate(invalid="ignore"):
        per_bin = [total / counts for total in sums]
    gaps = np.abs(sums[0] - sums[1])
    return Calibration(
        ece=float(gaps.sum() / len(y)),
        overconfidence=float(confidence.mean() - right.mean()),
        counts=counts,
        confidence=per_bin[0],
        accuracy=per_bin[1],
    )


def _check(p: NDArray[np.float64], y: NDArray[np.int64], n_bins: int) -> None:
    if p.ndim != 2 or len(p) != len(y) or y.ndim != 1 or 0 in p.shape:
        raise PathfmError(f"probabilities {p.shape} and labels {y.shape} do not belong together")
    if not (np.abs(p.sum(axis=1) - 1.0) < 1e-4).all() or not (p >= 0).all():
        bad = int((~(np.abs(p.sum(axis=1) - 1.0) < 1e-4)).sum())
        raise PathfmError(
            f"{bad:,} of {len(p):,} rows of probabilities do not sum to 1, or are below 0: "
            "give a softmax's output, not logits"
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise PathfmError(
            f"labels {y.min()} to {y.max()} lie outside the {p.shape[1]} classes of the probabilities"
        )
    if not 1 <= n_bins <= 10_000:
        raise PathfmError(f"{n_bins} bins: wanted 1 to 10,000")
