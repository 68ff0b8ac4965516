"""The Matthews correlation coefficient as a loss: the one here that rewards true background."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathfm.segmentation.losses.counts import (
    Averaging,
    SoftCounts,
    count,
    memberships,
    weighted_mean,
)

# Far below what one pixel right of 10^9 gives (10^-18), far above float32's smallest number.
SMALLEST_PRODUCT = 1e-20


def mcc_loss(
    logits: Tensor, target: Tensor, ignore: Tensor | None = None, **averaging: Any
) -> Tensor:
    """1 - (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)); a scalar, 0 (perfect) to 2.

    logits, target, ignore: binary or multi-class (one-vs-rest, then the mean over classes), see
    ``counts``; averaging: the fields of ``Averaging``. Counts are taken as shares of the pixels, so
    that the value does not depend on the picture's size (the usual + 1 below the line makes a
    perfect 4-pixel prediction score 0.25), and the product under the root is kept above 1e-20,
    because the bare root has a NaN gradient where nothing, or everything, is predicted.

    A truth of one class only (all background, all foreground) has no correlation. With
    ``empty="count"`` its loss is the share of wrong pixels, FP + FN: 0 where the prediction says the
    same, with a gradient that leads there; with "skip" it takes no part.

    Wants logits: probabilities are refused by nobody and give nonsense.
    Source: Matthews 1975; Abhishek & Hamarneh 2020 (arXiv:2010.13454), eq. 4.
    """
    how = Averaging(**averaging)
    counts = count(memberships(logits, target, ignore), how.reduction)
    pixels = counts.pixels
    shares = _divided(counts, pixels.clamp_min(1))
    one_class = counts.absent | counts.everywhere
    losses = torch.where(one_class, shares.fp + shares.fn, 1 - _coefficient(shares))
    takes_part = pixels > 0
    if how.empty == "skip":
        takes_part = takes_part & ~one_class
    return weighted_mean(losses, takes_part, how.weights(losses.shape[1], losses))


def _divided(counts: SoftCounts, by: Tensor) -> SoftCounts:
    return SoftCounts(counts.tp / by, counts.fp / by, counts.fn / by, counts.tn / by)


def _coefficient(c: SoftCounts) -> Tensor:
    product = (c.tp + c.fp) * (c.tp + c.fn) * (c.tn + c.fp) * (c.tn + c.fn)
    return (c.tp * c.tn - c.fp * c.fn) / product.clamp_min(SMALLEST_PRODUCT).sqrt()
