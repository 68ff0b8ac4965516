"""Dice of class masks: a picture and class at a time, then means; the loss that eva fits with.

Masks are integers (n, h, w), 0 the background. A class's Dice in a picture is 2 |P and T| / (|P| + |T|).
What a class scores in a picture whose truth lacks it is the question on which conventions disagree; here
it takes no part (NaN), as in kaiko-eva's `MonaiDiceScore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pathfm.runtime import PathfmError

EVA_SMOOTH = 1e-5
"""What MONAI's DiceLoss adds on both sides of the fraction."""


@dataclass(frozen=True, eq=False)
class DiceTable:
    """values: (n, classes) float64, NaN where the truth of a picture lacks a class; classes: names."""

    values: NDArray[np.float64]
    classes: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean Dice without background, 0..1: over the classes in each picture, then over pictures.

        Pictures of background alone take no part; NaN when there are no others.
        """
        found = self.pictures
        return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")

    @property
    def pictures(self) -> NDArray[np.float64]:
        """(n,): each picture's mean over its classes without background; NaN for background alone."""
        return _nanmean(self.values[:, 1:], axis=1)

    @property
    def per_class(self) -> dict[str, float]:
        """Each class's mean over the pictures that have it, background included; NaN if none has."""
        return dict(zip(self.classes, _nanmean(self.values, axis=0).tolist(), strict=True))


def dice_table(
    predicted: ArrayLike,
    truth: ArrayLike,
    classes: Sequence[str],
    ignore: int | None = None,
    eva_ignore: bool = False,
) -> DiceTable:
    """The Dice of every picture and class.

    predicted, truth: integers (n, h, w). ignore: a number in the truth, not a class, whose pixels take no
    part. eva_ignore: those pixels count as wrong wherever a class is predicted on them, as in eva 0.4.5,
    which means to leave them out but looks for the number in the prediction, where it never is.
    Raises PathfmError for unequal shapes and for numbers that are no class.
    """
    p, t = np.asarray(predicted), np.asarray(truth)
    if p.shape != t.shape or p.ndim != 3:
        raise PathfmError(f"masks {p.shape} and truth {t.shape}: both want to be (n, h, w)")
    n, k = len(p), len(classes)
    left_out = t == ignore if ignore is not None else np.zeros(t.shape, bool)
    for what, values in (("predicted mask", p), ("truth", t[~left_out])):
        if values.size and not 0 <= values.min() <= values.max() < k:
            raise PathfmError(
                f"a {what} has values {values.min()} to {values.max()} for {k} classes: is a number "
                "to be ignored not told?"
            )
    picture = np.broadcast_to(np.arange(n)[:, None, None], p.shape)
    kept = ~left_out
    judged = np.ones_like(kept) if eva_ignore else kept
    both = kept & (p == t)

    def pixels(mask: NDArray[np.bool_], of: NDArray[np.integer]) -> NDArray[np.int64]:
        cells = picture[mask] * k + of[mask].astype(np.int64)
        return np.bincount(cells, minlength=n * k).reshape(n, k)

    has, found = pixels(kept, t), pixels(judged, p)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = 2 * pixels(both, t) / (has + found)
    return DiceTable(np.where(has > 0, values, np.nan), tuple(classes))


def eva_dice_loss(logits: Tensor, truth: Tensor, ignore: int | None = None) -> Tensor:
    """The loss kaiko-eva 0.4.5 fits with: softmax, batch Dice of all classes, background included.

    logits: (B, C, h, w); truth: int64 (B, h, w). 1 - (2 I + s) / (P + T + s) a class, sums over the
    whole batch, s = 1e-5, mean over classes (MONAI's DiceLoss(softmax=True, batch=True)); float32.
    ignore: pixels of this number count as background predicted with 1 / C in every class, a constant
    without gradient, which is what eva's `ignore_index` comes to.
    """
    scores = logits.float()
    if ignore is not None:
        kept = truth != ignore
        truth, scores = truth * kept, scores * kept[:, None]
    p = scores.softmax(1)
    y = torch.nn.functional.one_hot(truth, p.shape[1]).movedim(-1, 1).to(p.dtype)
    axes = (0, 2, 3)
    intersection, total = (p * y).sum(axes), p.sum(axes) + y.sum(axes)
    return (1 - (2 * intersection + EVA_SMOOTH) / (total + EVA_SMOOTH)).mean()


def _nanmean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """numpy's nanmean without its warning for slices of NaN alone."""
    counts = np.isfinite(values).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.nansum(values, axis=axis) / counts
    return found
