"""Losses of each pixel by itself: cross-entropy, with softened labels, and focal.

Binary logits z are softmax over (0, z), so binary and multi-class are one formula. A weight of a
class multiplies its pixels' losses, and the sum is divided by the number of pixels, not of
weights (torch's ``CrossEntropyLoss(weight=)`` divides by the weights): twice the weight is twice
the push. ``classes`` leaves the pixels of other true classes out, as if they were ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pathfm.runtime import PathfmError
from pathfm.segmentation.loss_terms import Reduction
from pathfm.segmentation.losses.counts import (
    Averaging,
    checked,
    class_weights,
    prepared,
)
from pathfm.segmentation.losses.counts import weighted_mean as mean_over_pictures


def bce_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    reduction: Reduction = "batch",
) -> Tensor:
    """-1/N sum [y log p + (1 - y) log(1 - p)]; multi-class: -1/N sum_i sum_c y_ic log p_ic.

    logits, target, ignore: see ``counts``; N: the pixels that take part. class_weights: one a class,
    for binary logits (background, foreground). label_smoothing e: y' = y(1 - e) + e/C, C = 2 when
    binary; see ``soft_bce_loss``. reduction "batch": the mean over all pixels; "image": over each
    picture's, then over pictures (the same unless pixels are ignored or classes left out).

    A scalar, float32 (float64 if logits are), stable for logits of any size. 0 where no pixel takes
    part. Raises ``PathfmError`` for what does not fit.
    """
    checked("label_smoothing", label_smoothing, 0, 1)
    log_p, y, kept = _log_memberships(logits, target, ignore)
    y_soft = y * (1 - label_smoothing) + label_smoothing / y.shape[1]
    return _mean(-(y_soft * log_p), y, kept, class_weights, classes, reduction)


def soft_bce_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    label_smoothing: float = 0.1,
    class_weights: Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    reduction: Reduction = "batch",
) -> Tensor:
    """Cross-entropy against y' = y(1 - e) + e/2 (e/C for C classes): nobody is ever quite sure.

    With e = 0.1 labels 1 and 0 become 0.95 and 0.05 (smp's ``smooth_factor`` 0.1 makes them 0.9 and
    0.1: twice as soft). Least, but not 0, at p = y'. Otherwise as ``bce_loss``.
    Source: Szegedy et al. 2015 (arXiv:1512.00567), section 7.
    """
    return bce_loss(
        logits,
        target,
        ignore,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        classes=classes,
        reduction=reduction,
    )


def focal_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weights: Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    reduction: Reduction = "batch",
) -> Tensor:
    """-1/N sum (1 - p_t)^gamma log p_t, p_t the probability of the true class; a scalar.

    gamma = 0 is ``bce_loss``. alpha (binary only) weighs foreground by alpha and background by
    1 - alpha; for several classes there is class_weights. Truth between 0 and 1 is the mean of
    the two losses. The probability is a softmax when multi-class (smp takes one sigmoid a class).
    log(1 - p) is a log-sum-exp of the other classes, so no logit is too large.
    Otherwise as ``bce_loss``. Source: Lin et al. 2017 (arXiv:1708.02002), eq. 4 and 5.
    """
    checked("gamma", gamma, 0)
    log_p, y, kept = _log_memberships(logits, target, ignore)
    if alpha is not None:
        checked("alpha", alpha, 0, 1)
        if class_weights is not None or logits.ndim != target.ndim:
            raise PathfmError(
                "alpha is for binary logits without class_weights: give class_weights"
            )
        class_weights = (1 - alpha, alpha)
    modulator = (gamma * _log_complement(log_p)).exp()
    return _mean(-(y * modulator * log_p), y, kept, class_weights, classes, reduction)


def _log_memberships(
    logits: Tensor, target: Tensor, ignore: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, y, kept); binary as two classes, background first."""
    z, y, kept = prepared(logits, target, ignore)
    if z.shape[1] > 1:
        return z.log_softmax(1), y, kept
    return torch.cat([F.logsigmoid(-z), F.logsigmoid(z)], 1), torch.cat([1 - y, y], 1), kept


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) of every class, (B, C, N), from log p."""
    n_classes = log_p.shape[1]
    if n_classes == 2:
        return log_p.flip(1)
    others = [
        log_p[:, [c for c in range(n_classes) if c != left_out]].logsumexp(1)
        for left_out in range(n_classes)
    ]
    return torch.stack(others, 1)


def _mean(
    losses: Tensor,
    y: Tensor,
    kept: Tensor,
    weights: Sequence[float] | None,
    classes: Sequence[int] | None,
    reduction: Reduction,
) -> Tensor:
    """(B, C, N) losses of pixels and classes: weighed, summed over classes, averaged over pixels."""
    how = Averaging(reduction=reduction, class_weights=weights)
    w = class_weights(y.shape[1], weights, None, y)[:, None]
    if classes is not None:
        listed = class_weights(y.shape[1], None, classes, y)[:, None]
        kept = kept * (y * listed).sum(1, keepdim=True)
    total, pixels = (losses * w * kept).sum((1, 2)), kept.sum((1, 2))
    if how.reduction == "batch":
        total, pixels = total.sum(0, keepdim=True), pixels.sum(0, keepdim=True)
    each = total / torch.where(pixels > 0, pixels, 1)
    return mean_over_pictures(each[:, None], (pixels > 0)[:, None], each.new_ones(1))
